"""The cache files of one image, with a module for each format."""
