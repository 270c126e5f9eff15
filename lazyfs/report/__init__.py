"""What lazyfs reports of a mount: Prometheus metrics, and messages to the service manager."""
