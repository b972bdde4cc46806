"""Paths of stores as people write them: `run.zarr`, `seed*/run.zarr`."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from thimble_zarr.errors import ConfigError, NotAStoreError


def stores_at(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the paths that patterns match, sorted and without duplicates.

    What exists by its name is no pattern. Whether there is a store is not looked at. Raises
    NotAStoreError if a pattern matches nothing, and ConfigError if there are no paths.
    """
    patterns = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not patterns:
        raise ConfigError("no store was named; expected a path or a pattern such as seed*/run.zarr")
    return sorted({path for pattern in patterns for path in _matches(Path(pattern))})


def _matches(pattern: Path) -> list[str]:
    if pattern.exists() or not glob.has_magic(str(pattern)):
        return [str(pattern)]
    paths = glob.glob(str(pattern), recursive=True)  # noqa: PTH207  # pathlib has no absolute ones
    if not paths:
        raise NotAStoreError(f"no path matches {pattern}")
    return [str(Path(path)) for path in paths]
