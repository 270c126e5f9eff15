"""`python -m lazyfs`, and the `lazyfs` command."""

import sys


def main() -> int:
    """Run the command; also an interrupt while modules are loaded is one, not a traceback."""
    try:
        from lazyfs.cli import main as cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
