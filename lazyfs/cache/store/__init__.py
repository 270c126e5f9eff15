"""The cache files of one image, in each format."""
