"""Puts this folder on sys.path (by being here), so that every test can import `fakes` and `servers`."""
