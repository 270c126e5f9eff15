"""The repository over NBD."""
