"""What this host's /proc and sockets say of mounts, open files and processes."""
