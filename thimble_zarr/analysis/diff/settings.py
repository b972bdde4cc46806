"""What two runs say of themselves and is not the same: flags, dtypes, software, seeds, layout."""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain

from thimble_zarr.analysis.diff.result import Setting
from thimble_zarr.format.schema import Json, Schema
from thimble_zarr.optim.registry import SPECS

_OMITTED = ("created",)
"""When a run was recorded is always another time."""

_PROGRAM = tuple(f"optimizer.{flag}" for spec in SPECS for flag in spec.PROGRAM_FLAGS)
"""Flags of an optimizer that choose a program of torch's, which computes the same otherwise."""

_ENVIRONMENT = ("device", "n_threads", "cpu_capability", "contiguous", "software.", *_PROGRAM)
"""What settings begin with that another program, device or library goes with."""

_CHOSEN = ("optimizer.", "dtypes.")
"""What the others begin with that a step depends on."""


def settings(a: Schema, b: Schema) -> tuple[Setting, ...]:
    """Return what is not the same of two runs, by name, in the order of the schema."""
    of_a, of_b = dict(_fields(a)), dict(_fields(b))
    names = dict.fromkeys(chain(of_a, of_b))
    return tuple(
        Setting(name, of_a.get(name), of_b.get(name))
        for name in names
        if of_a.get(name) != of_b.get(name)
    )


def environment(found: tuple[Setting, ...]) -> tuple[Setting, ...]:
    """Return those that decide which program runs, on what."""
    return tuple(setting for setting in found if setting.name.startswith(_ENVIRONMENT))


def configuration(found: tuple[Setting, ...]) -> tuple[Setting, ...]:
    """Return those that say what a step computes, in which dtype."""
    return tuple(
        setting
        for setting in found
        if setting.name.startswith(_CHOSEN) and setting not in environment(found)
    )


def _fields(schema: Schema) -> Iterator[tuple[str, Json]]:
    content = asdict(schema)
    if schema.stored_last is not None:  # a bit a token, which nobody reads
        content["stored_last"] = f"tokens {zlib.crc32(schema.stored_last.encode()):08x}"
    for name, value in content.items():
        if name not in _OMITTED:
            yield from _flat(name, value)


def _flat(name: str, value: Json) -> Iterator[tuple[str, Json]]:
    """Yield a value, of a mapping each of its values by its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, [*value] if isinstance(value, tuple) else value
