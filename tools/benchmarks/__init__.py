"""`tools/bench`: lazyfs and its peers at the same work, side by side in one run."""
