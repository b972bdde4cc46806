"""`python -m thimble_zarr`: the command line, where its script is not on the path."""

from thimble_zarr.cli.main import main

if __name__ == "__main__":
    main()
