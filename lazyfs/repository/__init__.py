"""Reads the repository over NBD."""
