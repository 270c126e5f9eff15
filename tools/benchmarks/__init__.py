"""Implements `tools/bench`, which runs lazyfs and its peers at the same work side by side."""
