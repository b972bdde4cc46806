"""JSON: what is read is of bounded size and depth, and what is written has no NaN."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

MAX_DOCUMENT_BYTES = 2**26
"""Largest JSON document that is read."""

MAX_ITEMS = 2**21
"""Most items of all lists and objects in a document: in memory each takes some hundred bytes."""

MAX_DEPTH = 64
"""Deepest nesting of lists and objects in a document."""


class TooLargeError(ValueError):
    """A document has more bytes or items than are read."""


def parsed(content: bytes, max_depth: int = MAX_DEPTH) -> Any:
    """Return what JSON says.

    Raises ValueError if it is none, or is nested deeper than `max_depth`, and TooLargeError if it
    has more bytes or items than are read.
    """
    check_size(content)
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(value, max_depth)
    return value


def decoded(content: bytes, kind: type[T]) -> T:
    """Return what JSON says as a type of msgspec, in a fifth of the time of `parsed`.

    Raises ValueError and TooLargeError as that does; the depth of what has no type is not checked.
    """
    import msgspec  # not for `--help`

    check_size(content)
    try:
        return msgspec.json.decode(content, type=kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_size(content: bytes) -> None:
    """Raise TooLargeError if JSON is more than is read: what is not read must not be written."""
    n_items = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if len(content) > MAX_DOCUMENT_BYTES or n_items > MAX_ITEMS:
        raise TooLargeError(
            f"it has {len(content):,} bytes and {n_items:,} items, and at most "
            f"{MAX_DOCUMENT_BYTES:,} bytes and {MAX_ITEMS:,} items are read"
        )


def check_depth(value: Any, max_depth: int = MAX_DEPTH) -> None:
    """Raise ValueError if lists and objects are nested deeper."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(max_depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in _NESTED
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {max_depth} deep")


_NESTED = (dict, list)
"""What JSON makes of that, and nothing that is derived from it: to ask for a type takes no time."""


def finite(values: Mapping[str, Any]) -> dict[str, Json]:
    """Return values as JSON has them, nested ones too: what is no finite number is null."""
    known: dict[str, Json] = {}
    for name, value in values.items():
        is_finite = not isinstance(value, float) or math.isfinite(value)
        known[name] = finite(value) if isinstance(value, Mapping) else value if is_finite else None
    return known
