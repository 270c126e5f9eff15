"""Reads /proc and sockets of this host: its mounts, open files and processes."""
