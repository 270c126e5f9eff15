"""Ranges that are missing from the cache of one image: who fetches them, and who waits for them."""
