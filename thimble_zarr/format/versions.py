"""Versions of the format: which this release writes and reads, and how an older one becomes that.

A release reads the version that it writes and, where there is one in `_UPGRADES`, the one before.
"""

from collections.abc import Callable, Mapping

from thimble_zarr.errors import DamagedStoreError, UnsupportedFormatError
from thimble_zarr.format.documents import Json

FORMAT_VERSION = 6


def _from_5(content: dict[str, Json]) -> dict[str, Json]:
    """Version 5 has no coding but the plain one. The root of several parameters says nothing."""
    is_schema = "layout" in content
    return content | ({"coding": {"name": "plain"}} if is_schema else {})


_UPGRADES: Mapping[int, Callable[[dict[str, Json]], dict[str, Json]]] = {5: _from_5}
"""From a version to what makes of its content that of the next one."""


def versioned(content: Mapping[str, Json]) -> dict[str, Json]:
    """Return a `thimble` attribute of the content."""
    return {"format_version": FORMAT_VERSION} | dict(content)


def is_read(version: Json) -> bool:
    """Return whether this release reads what has a format version."""
    return isinstance(version, int) and (version == FORMAT_VERSION or version in _UPGRADES)


def upgrade(attribute: Json) -> dict[str, Json]:
    """Return the content of a `thimble` attribute as this version of the format has it.

    Raises
    ------
    UnsupportedFormatError
        If the format version is not one that this release reads.
    DamagedStoreError
        If there is none.

    Examples
    --------
    >>> upgrade({"format_version": 6, "parameters": ["a", "b"]})
    {'parameters': ['a', 'b']}
    """
    content = dict(attribute) if isinstance(attribute, Mapping) else {}
    written = content.pop("format_version", None)
    if not isinstance(written, int):
        raise DamagedStoreError("its `thimble` attribute has no format version")
    version = written
    while version in _UPGRADES:
        content, version = _UPGRADES[version](content), version + 1
    if version != FORMAT_VERSION:
        raise UnsupportedFormatError(
            f"it has format version {written}, and this release reads version "
            f"{FORMAT_VERSION}; install the thimble-zarr that wrote it, or a newer one"
        )
    return content
