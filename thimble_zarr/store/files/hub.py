"""Repositories of Hugging Face: what web address `hf://datasets/owner/name/run.zarr` stands for."""

import os
import re
from urllib.parse import quote, unquote

from thimble_zarr.errors import ConfigError
from thimble_zarr.format.location import Url

SCHEME = "hf://"

_KINDS = ("datasets", "spaces")
"""Repositories that their kind is said of; one of a model has none."""

_REFERENCE = re.compile(r"(refs/(?:convert/\w+|pr/\d+))/(.*)")
"""A revision whose slashes need not be quoted, and the path after it."""


def web_address(url: Url) -> str:
    """Return where the hub serves the files of an address that begins with `hf://`.

    As everywhere, a name may end with `@revision`, and `HF_ENDPOINT` is another hub. Slashes of a
    revision are written `%2F`, but for `refs/pr/1` and `refs/convert/parquet`. Raises ConfigError
    if the address names no repository and no path in it.

    Examples
    --------
    >>> web_address(Url("hf://datasets/owner/name@v1/run.zarr"))
    'https://huggingface.co/datasets/owner/name/resolve/v1/run.zarr'
    """
    parts = url.removeprefix(SCHEME).split("/")
    kind = [parts.pop(0)] if parts[0] in _KINDS else []
    if len(parts) < 3 or not all(parts):
        raise ConfigError(
            f"{url} names no store in a repository; expected hf://datasets/owner/name/run.zarr"
        )
    owner, repository, *path = parts
    name, _, revision = repository.partition("@")
    if revision and (found := _REFERENCE.match("/".join([revision, *path]))):
        revision, path = found[1], found[2].split("/")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    return "/".join([endpoint, *kind, owner, name, "resolve", _quoted(revision) or "main", *path])


def _quoted(revision: str) -> str:
    """Return a revision as one part of an address."""
    return quote(unquote(revision), safe="")


def headers() -> dict[str, str]:
    """Return what a request to the hub says of who asks, if the environment has a token."""
    token = os.environ.get("HF_TOKEN", "").strip()
    return {"authorization": f"Bearer {token}"} if token else {}
