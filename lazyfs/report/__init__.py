"""What others see of a mount: Prometheus metrics, and the messages to the service manager."""
