"""Serves the images of one mount: names, sizes, population, and the limits of the cache."""
