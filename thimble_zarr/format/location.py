"""Where a recording lies: at a path of this machine, or at the address of a server.

An address is plain text that may be printed and kept. So it has no password in it: what opens the
server comes from the environment.
"""

import os
from pathlib import Path, PurePosixPath
from typing import Self
from urllib.parse import urlsplit

from thimble_zarr.errors import ConfigError

SCHEMES = ("s3", "gs", "hf", "https", "http")
"""What an address may begin with."""


class Url(str):
    """The address of a store on a server, with as much of a `Path` as anybody asks for.

    Raises ConfigError if it is none, or has a password, a query or a fragment.

    Examples
    --------
    >>> url = Url("s3://bucket/runs/seed1.zarr/")
    >>> url, url.stem, url / "zarr.json"
    ('s3://bucket/runs/seed1.zarr', 'seed1', 's3://bucket/runs/seed1.zarr/zarr.json')
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Return the address, without the slash at its end."""
        scheme, _, rest = text.partition("://")
        if scheme not in SCHEMES:
            known = ", ".join(f"{one}://" for one in SCHEMES)
            raise ConfigError(f"there is no reading from {scheme}://; an address has {known}")
        if "@" in rest.partition("/")[0] or set("?#") & set(rest):  # printed are neither
            raise ConfigError(
                f"the {scheme}:// address has a user, a password, a query or a fragment in it; "
                "leave them out: credentials come from the environment (docs/remote.md)"
            )
        if not urlsplit(text).netloc:
            raise ConfigError(f"the address {text} names no server or bucket")
        return super().__new__(cls, text.rstrip("/"))

    def __truediv__(self, part: str) -> "Url":
        return str.__new__(Url, f"{self}/{part}")  # names of parameters may have any character

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return PurePosixPath(self).name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self).stem

    @property
    def suffix(self) -> str:
        """What the name ends with, from its last dot on."""
        return PurePosixPath(self).suffix


Location = Path | Url
"""Where a recording lies."""


def located(path: str | os.PathLike[str]) -> Location:
    """Return a path or an address as what it is.

    Examples
    --------
    >>> located("run.zarr"), located("s3://bucket/run.zarr")
    (PosixPath('run.zarr'), 's3://bucket/run.zarr')
    """
    return Url(path) if isinstance(path, str) and "://" in path else Path(path)


def on_disk(path: str | os.PathLike[str]) -> Path:
    """Return a path that is written to; raise ConfigError if it is an address."""
    location = located(path)
    if isinstance(location, Url):
        raise ConfigError(
            f"nothing writes to {location} itself; name a path of this machine, and copy the store "
            "with `thimble-zarr publish`"
        )
    return location
