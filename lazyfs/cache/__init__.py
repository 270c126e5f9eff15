"""The cache directory: the catalog, and the files of partial and whole images."""
