"""Fetches the ranges that are missing from the cache of one image, and lets readers wait."""
