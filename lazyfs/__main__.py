"""Starts lazyfs, as `python -m lazyfs` or as the command `lazyfs`."""

import sys


def main() -> int:
    """Run the command and return its exit code.

    An interrupt while modules are loaded ends the command without a traceback as well.
    """
    try:
        from lazyfs.cli import main as cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
