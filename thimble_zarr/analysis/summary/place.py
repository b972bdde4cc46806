"""Where the summary of a recording lies: beside it, or where the user's caches are.

Beside a store on a server nothing is written.
"""

import hashlib
import os
from pathlib import Path

import platformdirs

from thimble_zarr.format.location import Location, Url


def beside(store: Location, lattice: str | None = None) -> Path:
    """Return the place beside a store, or in the cache if that is on a server.

    `lattice` is a dtype that is not the recorded one.

    Examples
    --------
    >>> beside(Path("runs/seed1.zarr"))
    PosixPath('runs/seed1.summary.zarr')
    """
    if isinstance(store, Url):
        return in_cache(store, lattice)
    return store.with_name(_name(store, lattice))


def in_cache(store: Location, lattice: str | None = None) -> Path:
    """Return the place in the user's cache of a store that nothing can be written beside."""
    caches = Path(platformdirs.user_cache_dir("thimble-zarr"))
    return caches / "summaries" / digest(store) / _name(store, lattice)


def digest(path: Location) -> str:
    """Return a short name that no other path has."""
    return hashlib.sha256(
        os.fsencode(path if isinstance(path, Url) else path.absolute())
    ).hexdigest()[:16]


def is_summary(path: str | os.PathLike[str]) -> bool:
    """Return whether a path has the name of a summary, of any dtype.

    Examples
    --------
    >>> is_summary("runs/seed1.summary.bfloat16.zarr"), is_summary("runs/seed1.zarr")
    (True, False)
    """
    name = Path(path)
    return name.suffix == ".zarr" and ".summary" in name.suffixes[-3:-1]


def _name(store: Location, lattice: str | None) -> str:
    stem = store.stem if store.suffix in (".zarr", ".safetensors") else store.name
    return ".".join(filter(None, (stem, "summary", lattice, "zarr")))
