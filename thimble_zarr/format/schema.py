"""The contract: what is in a store, under which names, and what it means.

The recorder writes to it, the analysis reads from it, and neither knows the other. A recorded
parameter is one Zarr v3 group: the root of the store, or one of its children where there are
several. `Schema` is everything about it that is fixed when recording starts, kept as the group's
`thimble` attribute; `TokenLabels` are the coordinates of the token axis.

A parameter has any rank. Its first axis is called rows or tokens, and all others together dims:
what reads and computes sees `(step, token, dim)`, and only the arrays on disk and the variables of
a dataset have its own shape and dims.
"""

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np

from thimble_zarr.bits import NATIVE_DTYPES, fill_value, storage_dtype
from thimble_zarr.errors import ConfigError, DamagedStoreError
from thimble_zarr.format.coding import PLAIN, Coding
from thimble_zarr.format.documents import MAX_DEPTH, TooLargeError, parsed
from thimble_zarr.format.documents import Json as Json
from thimble_zarr.format.labels import TokenLabels as TokenLabels
from thimble_zarr.format.layout import SCALAR_CHUNK_STEPS, Layout, RowSize
from thimble_zarr.format.stored_array import LoggedArray, StoredArray, arrays_of
from thimble_zarr.format.versions import FORMAT_VERSION as FORMAT_VERSION
from thimble_zarr.format.versions import upgrade
from thimble_zarr.format.versions import versioned as versioned
from thimble_zarr.optim.base import Optimizer
from thimble_zarr.optim.registry import VARIABLES, checked, read_optimizer, step_scalars

ATTRIBUTE = "thimble"
"""The group attribute that holds the schema."""

TOKEN_DIMS = ("token", "dim")
"""Dims of an embedding: its tokens may have labels."""

LABELS: Mapping[str, str] = {
    "token": "token id",
    "count": "occurrences in the corpus",
    "live": "whether the token occurs in the corpus",
    "dead": "whether the token never occurs in the corpus",
    "text_bytes": "the tokens' texts, UTF-8, one after the other",
    "text_end": "where each token's text ends in text_bytes",
}
"""The coordinates of the token axis. All but `token` are there only where they are known."""

ROW_LABEL = "position along the first axis"
"""What the coordinate of the first axis is where that has no tokens. It is stored only where not
all rows are recorded."""

NOTEBOOK_FILE = "notebook_file"
"""The attribute of an imported run that describes the file it came from."""

SOURCE_FILE = "source_file"
"""The attribute of a run that was read from another file: which, of what layout, what of it was not
taken, and what is wrong with its numbers."""

PARAMETERS = "parameters"
"""In the root's `thimble` attribute the names of several parameters, each a child group."""


def chosen_variables(optimizer: Optimizer, variables: Sequence[str] | None) -> tuple[str, ...]:
    """Return the variables of a run that are to be recorded: all by default, and always `W`.

    Raises ConfigError if one of them is not a variable.
    """
    if variables is None:
        return optimizer.variables
    chosen = {variables} if isinstance(variables, str) else set(variables)
    recorded = optimizer.variables
    if unknown := sorted(map(str, chosen - set(recorded))):
        raise ConfigError(
            f"there is no variable {', '.join(unknown)} to record; choose among "
            f"{', '.join(recorded)}"
        )
    return tuple(name for name in recorded if name in chosen | {"W"})


def dims_of(shape: Sequence[int], *, of_tokens: bool = False) -> tuple[str, ...]:
    """Return how the axes of a parameter are called, `of_tokens` if it is an embedding."""
    if len(shape) == 2:
        return TOKEN_DIMS if of_tokens else ("row", "col")
    return ("dim",) if len(shape) == 1 else tuple(f"dim_{axis}" for axis in range(len(shape)))


def array_path(group: str, name: str) -> str:
    """Return where in a store an array lies: the group is empty for a single parameter."""
    return f"{group}/{name}" if group else name


def check_group_name(name: str) -> None:
    """Raise ConfigError unless a parameter's name can be that of its group.

    It is refused and not replaced, so that a name found in a store is the one in the model.
    """
    sound = (
        name.isprintable()
        and not set(name) & set("/\\")
        and not name.startswith((".", "__"))
        and 0 < len(name.encode()) <= _MOST_NAME_BYTES
        and name != "zarr.json"
    )
    if not sound:
        raise ConfigError(
            f"a parameter named {name!r} cannot be a Zarr group: names have no slashes, begin "
            f"with neither . nor __ and have at most {_MOST_NAME_BYTES} bytes; give it another "
            'one, parameters={"name": tensor}'
        )


_MOST_NAME_BYTES = 255
"""What file systems take for a name."""


def row_size(shape: Sequence[int], dtypes: Mapping[str, str], coding: Coding = PLAIN) -> RowSize:
    """Return how large a row of a parameter is, from its shape and the dtypes of its variables."""
    itemsizes = {name: storage_dtype(native).itemsize for name, native in dtypes.items()}
    predicted = tuple(name for name in dtypes if coding.predicts(name))
    return RowSize(shape[0] if shape else 1, math.prod(shape[1:]), itemsizes, predicted)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Everything about a recorded parameter that is fixed when recording starts.

    Attributes
    ----------
    shape
        Shape of what is recorded of the parameter, of any rank.
    dims
        What its axes are called (`dims_of`).
    dtypes
        Native dtype of each array of its shape, by variable, as torch names it.
    layout
        Block and chunk sizes.
    optimizer
        The optimizer that was recorded.
    coding
        How the arrays are written.
    parameter
        The parameter's name in its model, where known.
    device
        Where the parameter lived, as torch names it.
    n_threads
        Threads that torch had for one operation on the CPU: where they divide the parameter between
        them, some of torch's programs round differently (`optim.lanes`).
    cpu_capability
        Vector instructions that torch used on the CPU, by its own name, for example `AVX2`: others
        may round differently. None where nobody said.
    contiguous
        Whether the parameter lay in memory row by row. Programs that go through memory see other
        elements together where it did not.
    whole_tokens
        Rows of the whole parameter where only some are recorded, whose ids are then the coordinate
        of the first axis. None where all are.
    stored_last
        Which tokens lie on disk after all others, and so in chunks of their own but for one at the
        border: a mask, its bits packed, in hexadecimal. The coordinate `token` has the order. None
        where they lie in the order of their ids.
    schedule
        Which steps are recorded, in words. None where all are.
    software
        Versions of what recorded the run, by package.
    created
        When recording started, ISO 8601, UTC.
    attrs
        What the user said of the run: configuration, corpus, seeds.
    logged
        What was logged at each step besides the loss, by name. Of several parameters the first has
        it.
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtypes: Mapping[str, str]
    layout: Layout
    optimizer: Optimizer
    coding: Coding = PLAIN
    parameter: str | None = None
    device: str = "cpu"
    n_threads: int = 1
    cpu_capability: str | None = None
    contiguous: bool = True
    whole_tokens: int | None = None
    stored_last: str | None = None
    schedule: str | None = None
    software: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    attrs: Mapping[str, Json] = field(default_factory=dict)
    logged: Mapping[str, LoggedArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = (*self.shape, self.layout.block_steps, self.layout.chunk_tokens)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ConfigError(f"shapes and block sizes must be positive numbers, not {sizes}")
        if self.dims not in (dims_of(self.shape), dims_of(self.shape, of_tokens=True)):
            raise ConfigError(f"no parameter of shape {self.shape} has the dims {self.dims}")
        if self.n_threads < 1:
            raise ConfigError(f"torch has at least 1 thread, not {self.n_threads}")
        if self.whole_tokens is not None and not (
            self.shape and self.whole_tokens >= self.shape[0]
        ):
            raise ConfigError(
                f"{self.shape} cannot be a part of a parameter of {self.whole_tokens} rows"
            )
        if self.stored_last is not None and not (
            self.has_tokens and _is_mask(self.stored_last, self.n_tokens)
        ):
            raise ConfigError(
                f"{self.stored_last!r} does not say which of {self.shape} are stored last"
            )
        if SCALAR_CHUNK_STEPS % self.layout.block_steps:
            raise ConfigError(f"blocks of {self.layout.block_steps} steps do not divide a chunk")
        for name, native in self.dtypes.items():
            if name not in (known := {*VARIABLES, *self.optimizer.variables}):
                raise ConfigError(f"{name!r} is not a variable: a store has {', '.join(known)}")
            if native not in NATIVE_DTYPES:
                raise ConfigError(
                    f"{name} is {native}: a store holds {', '.join(NATIVE_DTYPES)} only"
                )

    def labelled(self, labels: TokenLabels | None) -> Self:
        """Return the same, with the tokens stored last that labels call dead.

        Who reads them alone then reads their chunks alone, of which others have a part of one.
        Raises ConfigError if the labels do not fit.
        """
        if labels is None:
            return self
        self.check_labels(labels)
        dead = labels.dead
        if dead is None or dead.all() or not dead.any():
            return self
        return replace(self, stored_last=packed_mask(dead))

    def check_labels(self, labels: TokenLabels) -> None:
        """Raise ConfigError unless the parameter has tokens, and every label one of each."""
        if not self.has_tokens:
            raise ConfigError(
                "labels are of the tokens of an embedding of shape (token, dim), and the parameter "
                f"{self.parameter or 'given'} has shape {self.shape}; leave its labels out"
            )
        labels.check_length(self.n_tokens)

    def check_json(self) -> None:
        """Raise ConfigError unless everything known of the run can be kept as strict JSON."""
        for name, value in self.attrs.items():
            try:
                parsed(json.dumps(value, allow_nan=False).encode(), MAX_DEPTH // 2)
            except TooLargeError as error:
                raise ConfigError(
                    f"attrs[{name!r}] is too large: {error}; keep it in a file beside the store"
                ) from error
            except (TypeError, ValueError) as error:
                raise ConfigError(f"attrs[{name!r}] cannot be kept as JSON: {error}") from error

    @property
    def scalars(self) -> dict[str, str]:
        """The float64 `(step,)` arrays of the parameter, and what they are, in words."""
        return step_scalars(type(self.optimizer))

    @property
    def numbers(self) -> dict[str, str]:
        """The same, and what torch derived from them where a prediction needs it."""
        derived = type(self.optimizer).DERIVED if self.coding.is_predicted else ()
        return self.scalars | {of.name: of.long_name for of in derived}

    @property
    def per_step(self) -> dict[str, str]:
        """All `(step,)` arrays of the parameter, and what they are, in words."""
        return {"step": "optimizer step, counted from 1; row 0 is the initial state"} | self.numbers

    def fill(self, variable: str) -> float:
        """Return what stands for missing among the stored bits of a variable."""
        return fill_value(self.dtypes[variable])

    @functools.cached_property
    def arrays(self) -> dict[str, StoredArray]:
        """The arrays of the parameter's variables on disk, by name."""
        found = itertools.starmap(partial(arrays_of, self.coding), self.dtypes.items())
        return {array.name: array for array in itertools.chain.from_iterable(found)}

    @property
    def is_imported(self) -> bool:
        """Whether the run was imported from another file, and not recorded."""
        return NOTEBOOK_FILE in self.attrs or SOURCE_FILE in self.attrs

    def whole_rows(self, n_rows: int) -> range:
        """Return the rows, of so many, of which every variable is there: of most runs all.

        A run that was read from another file may have states of the first steps only.
        """
        source = self.attrs.get(SOURCE_FILE)
        known = source.get("whole_rows") if isinstance(source, Mapping) else None
        match known:
            case [int(first), int(stop)]:
                return range(first, stop)[:n_rows]
        return range(n_rows)

    @property
    def caveat(self) -> str | None:
        """What is wrong with the numbers of an imported run, in words, where that is known."""
        source = self.attrs.get(SOURCE_FILE)
        caveat = source.get("caveat") if isinstance(source, Mapping) else None
        return caveat if isinstance(caveat, str) else None

    @property
    def n_tokens(self) -> int:
        """Recorded rows of the parameter: its first axis, 1 of a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def n_dims(self) -> int:
        """Elements a row: all other axes together, 1 of a scalar or vector."""
        return math.prod(self.shape[1:])

    @property
    def n_elements(self) -> int:
        """Elements of the whole parameter, recorded or not."""
        return (self.whole_tokens or self.n_tokens) * self.n_dims

    @property
    def has_tokens(self) -> bool:
        """Whether the rows are tokens, and may have labels."""
        return self.dims == TOKEN_DIMS

    @property
    def stored_order(self) -> np.ndarray | None:
        """The tokens in the order in which they lie on disk; None where that is that of ids.

        Everywhere else tokens are counted in the order of their ids.
        """
        return None if self.stored_last is None else _order(self.stored_last, self.n_tokens)[0]

    @property
    def places(self) -> np.ndarray | None:
        """Where each token lies on disk: what undoes `stored_order`."""
        return None if self.stored_last is None else _order(self.stored_last, self.n_tokens)[1]

    @property
    def row_name(self) -> str:
        """What a row is called: `token`, `row`, or `element` where it is a single one."""
        return "token" if self.has_tokens else "row" if len(self.shape) > 1 else "element"

    def place(self, token: int, dim: int | None = None) -> str:
        """Return where an element is, or all of a row, by the names of the parameter's axes."""
        if not self.shape:
            return "its only element"
        index = [token]
        if dim is not None and len(self.shape) > 1:
            index += map(int, np.unravel_index(dim, self.shape[1:]))
        return ", ".join(f"{name} {at}" for name, at in zip(self.dims, index, strict=False))

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of one row of all variables."""
        return row_size(self.shape, self.dtypes).n_bytes

    def to_attribute(self) -> dict[str, Json]:
        """Return the value of the group attribute `thimble`, ready for JSON."""
        content = asdict(self) | {"shape": [*self.shape], "dims": [*self.dims]}
        logged = {name: {**asdict(of), "shape": [*of.shape]} for name, of in self.logged.items()}
        del content["logged"]
        return versioned(content | ({"logged": logged} if logged else {}))

    @classmethod
    def from_attribute(cls, value: Json) -> Self:
        """Read what `to_attribute` wrote.

        Raises UnsupportedFormatError if the format version is not one that this release reads, and
        DamagedStoreError if the version is right but the content is not what it promises.
        """
        content: dict[str, Any] = upgrade(value)
        try:
            content["shape"], content["dims"] = tuple(content["shape"]), tuple(content["dims"])
            content["layout"] = Layout(**content["layout"])
            content["optimizer"] = read_optimizer(content["optimizer"])
            content["coding"] = Coding(**checked(Coding, content["coding"]))
            logged = content.get("logged", {}).items()
            content["logged"] = {name: LoggedArray.from_json(of) for name, of in logged}
            return cls(**checked(cls, content))
        except (TypeError, KeyError, AttributeError, ConfigError) as error:
            raise DamagedStoreError(f"its `thimble` attribute is malformed: {error}") from error


def packed_mask(mask: np.ndarray) -> str:
    """Return a mask as text, its bits packed."""
    return np.packbits(mask).tobytes().hex()


def _unpacked(text: str, length: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=length)


def _is_mask(text: str, length: int) -> bool:
    try:
        return packed_mask(_unpacked(text, length)) == text
    except ValueError:
        return False


@functools.lru_cache(maxsize=8)
def _order(mask: str, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens in their order on disk, and the place of each."""
    order = np.argsort(_unpacked(mask, n_tokens), kind="stable")
    places = np.argsort(order)
    order.flags.writeable = places.flags.writeable = False  # who has them shares them
    return order, places
