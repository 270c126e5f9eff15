"""The images of one mount: their names and sizes, population, and the limits of the cache."""
