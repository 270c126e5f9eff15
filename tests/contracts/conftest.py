"""The contract tests run each fake beside the real thing."""
