"""Manages one image from its first open until it is a plain file."""
