"""`python -m lazyfs`: the same as the `lazyfs` command."""

import sys

from lazyfs import cli

if __name__ == "__main__":
    sys.exit(cli.main())
