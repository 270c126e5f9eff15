"""The lazyfs command: its arguments, its configuration files, its verbs, and what it prints."""
