"""lazyfs: a FUSE filesystem that shows NBD exports as local files and fills a cache behind them."""

__version__ = "0.1.0"
