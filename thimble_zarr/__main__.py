"""The command `thimble-zarr`, also as `python -m thimble_zarr`.

Ctrl-C while it starts is no traceback: this module imports nothing before it can tell.
"""

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line."""
    try:
        from thimble_zarr.cli.main import main as run

        run()
    except KeyboardInterrupt:  # of what came later `run` has told itself
        print("Interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
