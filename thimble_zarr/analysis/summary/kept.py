"""A summary where it is kept: an ordinary Zarr, with a note of which rows of which run it has.

The note is the attribute `thimble_summary` of the parameter's group. It is written when everything
else is there: what a summary has no note of, it does not have, whatever lies in its files.
"""

import getpass
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import filelock
import msgspec
import numpy as np
import zarr
from zarr.codecs import BloscCodec

from thimble_zarr.analysis.compute.source import Selected
from thimble_zarr.analysis.summary.contents import LAST_STEPS, QUANTILES, Contents
from thimble_zarr.analysis.summary.groups import Groups
from thimble_zarr.analysis.summary.place import digest
from thimble_zarr.errors import StoreExistsError

if TYPE_CHECKING:
    import xarray as xr

_VERSION = 1

_ATTRIBUTE = "thimble_summary"

_NOTHING: Any = {"zarr_format": 3, "attributes": {_ATTRIBUTE: {}}}

BATCH = 8
"""Tasks whose numbers of groups share a chunk: they are few, and files take time."""

_CHUNK_ELEMENTS = 2**18
"""Numbers of a chunk, about: a megabyte."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What a summary is of.

    Attributes
    ----------
    identity
        What the rows are known by (`Reader.identity`).
    n_rows
        Rows that it has.
    ulp_dtype
        The dtype in whose ULP steps are measured.
    groups, quantiles
        The labels of these dims.
    chunk_rows
        Rows a chunk of what tokens have.
    version
        Of the code that made it: it is raised when numbers change.
    """

    identity: str
    n_rows: int
    ulp_dtype: str
    groups: tuple[str, ...]
    quantiles: tuple[float, ...] = QUANTILES
    chunk_rows: int
    version: int = _VERSION


@dataclass(frozen=True)
class Kept:
    """The summary of a parameter at a place, there or not.

    Attributes
    ----------
    path
        The Zarr.
    group
        The parameter's group in it, as in the store; empty for a single one.
    """

    path: Path
    group: str = ""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have other processes of this user wait that want to write to it, too."""
        # Not in the Zarr, which has nothing else in it, and not beside it, where it would stay.
        name = f"thimble-zarr-{_user()}-{digest(self.path)}.lock"
        with filelock.FileLock(Path(tempfile.gettempdir()) / name):
            yield

    def check_place(self) -> None:
        """Raise StoreExistsError if something else lies at the place."""
        is_free = not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))
        if not is_free and _ATTRIBUTE not in _attributes(self.path, ""):
            raise StoreExistsError(
                f"{self.path} is there and is no summary; remove it, or name another place"
            )

    @property
    def note(self) -> Note | None:
        """What it has; None where there is nothing that this version can use."""
        try:
            note = msgspec.convert(_attributes(self.path, self.group)[_ATTRIBUTE], Note)
        except (KeyError, msgspec.ValidationError):
            return None
        return note if note.version == _VERSION and note.quantiles == QUANTILES else None

    def groups(self, note: Note) -> Groups:
        """Return its groups."""
        return Groups(note.groups, np.asarray(self._open("r")["is_member"]))

    def is_ahead(self, note: Note) -> bool:
        """Return whether last steps are of rows that the note has not: who wrote it was killed."""
        group = self._open("r")
        last = int(group["step"][note.n_rows - 1])
        return bool((group[next(iter(LAST_STEPS))][:] > last).any())  # it is written first

    @property
    def aside(self) -> "Kept":
        """A place for what is made anew: what is here stays until that is complete."""
        return Kept(self.path.with_name(f".{self.path.name}.new"), self.group)

    def become(self, other: "Kept") -> None:
        """Have what another one has, which is gone then."""
        old = self.path.with_name(f".{self.path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.group and not _attributes(self.path, ""):
            zarr.create_group(self.path, **_NOTHING)
        here = self.path / self.group
        here.parent.mkdir(parents=True, exist_ok=True)
        if here.exists():
            here.rename(old)
        (other.path / self.group).rename(here)
        if self.group:
            self._consolidate()
        for rest in (old, other.path):
            shutil.rmtree(rest, ignore_errors=True)

    def finish(self, note: Note) -> None:
        """Say what it has now: for others in the consolidated metadata, and for us in the note."""
        self._consolidate()
        group = zarr.open_group(self.path, path=self.group, mode="r+")
        group.attrs[_ATTRIBUTE] = msgspec.to_builtins(note)
        if self.group:
            self._consolidate()  # the root's has a copy of the note

    def _consolidate(self) -> None:
        """Have the root tell of all arrays: xarray looks there, and not for what lies in it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consolidated metadata", zarr.errors.ZarrUserWarning)
            zarr.consolidate_metadata(self.path)

    def begin(self, selected: Selected, groups: Groups, *, chunk_rows: int) -> None:
        """Put arrays for all rows there, and remove what is there."""
        if self.group:
            zarr.create_group(self.path, overwrite=True, **_NOTHING)
        group: Any = zarr.create_group(self.path, path=self.group, overwrite=True, **_NOTHING)
        sizes = {
            "group": len(groups.names),
            "step": len(selected.rows),
            "token": len(selected.tokens),
            "dim": len(selected.dims),
            "quantile": len(QUANTILES),
        }
        contents = Contents(selected.source.reader.schema)
        for name, variable in contents.variables.items():
            group.create_array(
                name,
                shape=tuple(sizes[dim] for dim in variable.dims),
                chunks=_chunks(variable.dims, sizes, chunk_rows),
                dtype=variable.dtype,
                dimension_names=variable.dims,
                fill_value=np.nan if variable.dtype in (np.float32, np.float64) else 0,
                compressors=_compressor(variable.dtype),
                attributes={"long_name": variable.long_name},
            )
        group["is_member"][:] = groups.is_member
        for name, values in (("step", selected.steps), ("token", selected.ids)):
            array = group.create_array(
                name,
                shape=values.shape,
                chunks=(4096,) if name == "step" else (max(1, len(values)),),
                dtype=np.int64,
                dimension_names=(name,),
                fill_value=-1,
                compressors=_compressor(np.int64),
            )
            array[:] = values

    def extend(self, steps: np.ndarray) -> None:
        """Make room for so many rows, and write their steps."""
        group = self._open("r+")
        for _, array in group.arrays():
            dims = _dims(array)
            if "step" in dims:
                size = {**dict(zip(dims, array.shape, strict=True)), "step": len(steps)}
                array.resize(tuple(size.values()))
        group["step"][:] = steps

    def write(self, numbers: Mapping[str, np.ndarray], rows: slice) -> None:
        """Write the numbers of some rows."""
        group = self._open("r+")
        for name, values in numbers.items():
            array = group[name]
            array[tuple(rows if dim == "step" else slice(None) for dim in _dims(array))] = values

    def write_of_groups(self, parts: Sequence[Mapping[str, np.ndarray]], first_row: int) -> None:
        """Write the numbers that groups have at consecutive rows, of several tasks."""
        joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
        n_rows = next(iter(joined.values())).shape[1]
        self.write(joined, slice(first_row, first_row + n_rows))

    def write_last_steps(self, found: Mapping[str, np.ndarray]) -> None:
        """Write the last steps of some rows, where they are later than what is there."""
        group = self._open("r+")
        for name in LAST_STEPS:
            group[name][:] = np.maximum(group[name][:], found[name])

    def open(self) -> "xr.Dataset":
        """Open it as a dataset: lazy, with labels of groups and quantiles, without other labels."""
        import xarray as xr

        note = self.note
        assert note is not None
        group = self.group or None
        ds: xr.Dataset = xr.open_zarr(self.path, group=group, consolidated=False, chunks={})
        ds = ds.isel(step=slice(0, note.n_rows))[sorted(map(str, ds.data_vars))]
        coords = {"group": [*note.groups], "quantile": [*note.quantiles]}
        return ds.assign_coords(coords).assign_attrs(ulp_dtype=note.ulp_dtype)

    def _open(self, mode: Literal["r", "r+"]) -> Any:
        return zarr.open_group(self.path, path=self.group, mode=mode, use_consolidated=False)


def _user() -> str:
    """Return whose process it is: in a container a user need not have a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _attributes(path: Path, group: str) -> Mapping[str, object]:
    """Return what is known of a group; nothing where there is none."""
    try:
        found = zarr.open_group(path, path=group, mode="r", use_consolidated=False)
        return found.attrs.asdict()
    except (OSError, ValueError, KeyError):
        return {}


def _dims(array: Any) -> tuple[str, ...]:
    return tuple(array.metadata.dimension_names)


def _chunks(dims: tuple[str, ...], sizes: Mapping[str, int], chunk_rows: int) -> tuple[int, ...]:
    """Return how an array is cut: what tokens have by task, what groups have by several."""
    # Each group has its chunks: who has it open reads what was there before one was added.
    chunks = {**sizes, "step": BATCH * chunk_rows, "group": 1}
    if "token" in dims:
        most = max(1, _CHUNK_ELEMENTS // chunk_rows)
        chunks |= {"step": chunk_rows, "token": _even(sizes["token"], most)}
    return tuple(chunks[dim] for dim in dims)


def _even(n: int, most: int) -> int:
    """Return the length of pieces that are alike and at most so long."""
    return max(1, -(-n // max(1, -(-n // most))))


def _compressor(dtype: type[np.generic]) -> BloscCodec:
    size = np.dtype(dtype).itemsize
    return BloscCodec(typesize=size, cname="lz4", clevel=5, shuffle="shuffle")
