"""Holds the connection to the kernel: mounting, FUSE requests, and passthrough."""
