"""The file of the original notebook, read in place: one safetensors file with everything in it.

`W`, `grad_W`, `momentum_W` and `variance_W` have a row for the initial state and one for each step;
beside them lie the losses and, as tensors without dimensions, the hyper-parameters. The gradient of
the initial state is zero there, and missing here. The notebook kept the moments as float32 although
those of bfloat16 weights are bfloat16: where half of every number is zero, that half is left out.
"""

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from thimble_zarr.bits import decode, fill_value, storage_dtype
from thimble_zarr.errors import DamagedStoreError, NotAStoreError, StoreError
from thimble_zarr.format.indexing import Indices, as_slice
from thimble_zarr.format.layout import plan_layout
from thimble_zarr.format.reader import History, Recording, State
from thimble_zarr.format.schema import NOTEBOOK_FILE, TOKEN_DIMS, Schema, TokenLabels
from thimble_zarr.optim.adam import Adam
from thimble_zarr.optim.programs.kernel import StepNumbers
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.sources.notebook.file_layout import (
    FILE_NAMES,
    LOSSES,
    NATIVE,
    STATES,
    NotebookLayout,
    read_bits,
    read_rows,
)
from thimble_zarr.store.reader import StorePath


@dataclass(frozen=True)
class NotebookReader:
    """The rows of a notebook's file, read in place. Made by `open`; small to pickle.

    What the file does not say (versions, device) is not in `schema`. The labels of its tokens come
    from elsewhere.
    """

    path: Path
    layout: NotebookLayout
    schema: Schema
    labels: TokenLabels = field(default_factory=TokenLabels, compare=False)

    group: ClassVar = ""
    kind: ClassVar = "the notebook's file"
    recording: ClassVar = Recording(State.CLOSED)
    integrity: ClassVar = None  # the file has no checksums

    @classmethod
    def open(cls, path: StorePath, *, labels: TokenLabels | None = None) -> Self:
        """Open a notebook's file. Of the big tensors a few rows are looked at.

        Raises NotAStoreError or DamagedStoreError if it is not one of the notebook or was cut off,
        StoreError if it cannot be read, and ConfigError if there are not as many labels as tokens.
        """
        path, labels = Path(path).absolute(), labels or TokenLabels()
        if not path.exists():
            raise NotAStoreError(f"there is nothing at {path}; check the path")
        with _named_errors(path):
            layout = NotebookLayout.read(path)
            reader = cls(path, layout, _schema(path, layout, layout.dtypes), labels)
            if next(read_rows(path, layout.tensors[FILE_NAMES["grad"]], [0])).any():
                raise NotAStoreError(
                    "grad_W of row 0, the initial state, is not zero; the notebook's row t has the "
                    "gradient that step t consumed, and row 0 has none"
                )
            last = reader.n_rows - 1
            reader = reader.narrowed((min(1, last), last // 2, last))
        labels.check_length(reader.schema.n_tokens)
        return reader

    def narrowed(
        self, rows: Iterable[int], *, on_bytes: Callable[[int], object] = lambda n_bytes: None
    ) -> Self:
        """Return the reader whose states are bfloat16 if they are so in all of these rows."""
        dtypes = self.layout.dtypes
        if {dtypes[name] for name in STATES} == {"float32"} and self._is_narrow(rows, on_bytes):
            dtypes |= dict.fromkeys(STATES, "bfloat16")
        return replace(self, schema=_schema(self.path, self.layout, dtypes))

    def _is_narrow(self, rows: Iterable[int], on_bytes: Callable[[int], object]) -> bool:
        """Return whether the states have numbers of bfloat16 only: their low half is zero."""
        for name in STATES:
            for bits in read_rows(self.path, self.layout.tensors[FILE_NAMES[name]], rows):
                if bits.view("<u2")[..., ::2].any():
                    return False
                on_bytes(bits.nbytes)
            del bits  # before the next state's is made: two would cost page faults each time
        return True

    def chunk_checksums(self) -> None:
        """Return None: the file has no checksums."""

    @property
    def n_rows(self) -> int:
        """Rows of the file: the initial state and one for each step."""
        return self.layout.tensors["W"].shape[0]

    @property
    def identity(self) -> str:
        """What the file is known by: its size, and when it was written."""
        status = self.path.stat()
        return f"{status.st_size}:{status.st_mtime_ns}"

    def rows_since(self, identity: str) -> int:
        """Return all rows if the file is the same, else 0."""
        return self.n_rows if identity == self.identity else 0

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the bits of a variable as a store would hold them, and as `Reader.read` says.

        Besides what it returns it takes the memory of two rows. `out` is of no use here. Raises
        DamagedStoreError if the file was cut off since it was opened, or numbers that were taken
        for bfloat16 are none, and StoreError if it cannot be read.
        """
        native = self.schema.dtypes[name]
        ids = np.arange(self.schema.n_tokens) if tokens is None else np.asarray(tokens)
        shape = (rows[1] - rows[0], len(ids), self.schema.n_dims)
        stored = np.empty(shape, storage_dtype(native).newbyteorder("<"))
        if stored.size:
            first, end = int(ids.min()), int(ids.max()) + 1
            wanted = as_slice(ids - first)
            with _named_errors(self.path):
                found = self._rows(name, range(*rows), (first, end))
                for target, bits in zip(stored, found, strict=True):
                    target[...] = bits[wanted]
        if name == "grad" and rows[0] == 0:
            stored[:1] = fill_value(native)
        return stored.astype(storage_dtype(native), copy=False)

    def opened(self) -> AbstractContextManager[Self]:
        """Return these rows: nothing stays open."""
        return nullcontext(self)

    def read_together(
        self, outs: Mapping[str, np.ndarray], rows: tuple[int, int], tokens: Indices
    ) -> None:
        """Read bits of several variables, each into an array, as `read` does."""
        for name, out in outs.items():
            out[...] = self.read(name, rows, tokens)

    def predicted(
        self,
        rows: tuple[int, int],
        tokens: Indices,
        program: PortableProgram,
        numbers: StepNumbers,
    ) -> np.ndarray:
        """Return that none is computed."""
        return np.zeros(rows[1] - rows[0], bool)

    def will_read(self, names: Sequence[str], rows: tuple[int, int], tokens: Indices) -> None:
        """Do nothing: rows lie one after the other, so that the system reads ahead by itself."""

    def read_scalars(self) -> dict[str, np.ndarray]:
        """Return every per-step scalar."""
        rows = np.arange(self.n_rows, dtype=np.float64)
        losses = self.layout.tensors[LOSSES]
        with _named_errors(self.path):
            loss = decode(read_bits(self.path, losses), NATIVE[losses.dtype], np.float64)
        known = {"loss": loss, "optimizer_step": rows}
        for name, value in self.layout.hyperparameters().items():
            known[name] = np.where(rows > 0, value, np.nan)
        return {name: known[name] for name in self.schema.scalars}

    def read_steps(self) -> np.ndarray:
        """Return the step of each row."""
        return np.arange(self.n_rows)

    def read_token_ids(self) -> np.ndarray:
        """Return which row of the parameter each token is."""
        return np.arange(self.schema.n_tokens)

    def read_labels(self) -> TokenLabels:
        """Return what is known of the tokens."""
        return self.labels

    def read_history(self) -> History:
        """Return an empty history: the file has none."""
        return History()

    def disk_bytes(self) -> int:
        """Return the size of the file."""
        return self.path.stat().st_size

    def _rows(self, name: str, steps: range, columns: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield rows as a store has them, in one and the same array."""
        tensor = self.layout.tensors[FILE_NAMES[name]]
        is_narrow = NATIVE[tensor.dtype] != self.schema.dtypes[name]
        for step, bits in zip(steps, read_rows(self.path, tensor, steps, columns), strict=True):
            if not is_narrow:
                yield bits
            elif bits.view("<u2")[..., ::2].any():
                raise DamagedStoreError(
                    f"{FILE_NAMES[name]} has float32 numbers at step {step}, and bfloat16 "
                    "numbers only in the rows that were looked at first; `thimble-zarr import` "
                    "looks at all of them, and the store it makes can be read"
                )
            else:
                yield bits.view("<u2")[..., 1::2]


def has_narrow_states(schema: Schema) -> bool:
    """Return whether the moments are float32 in the notebook's file and bfloat16 here."""
    attribute = schema.attrs.get(NOTEBOOK_FILE)
    dtypes = schema.dtypes if attribute is None else NotebookLayout.from_attribute(attribute).dtypes
    return any(dtypes[name] != schema.dtypes[name] for name in STATES)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Name the file in what is wrong with it."""
    try:
        yield
    except (NotAStoreError, DamagedStoreError) as error:
        raise type(error)(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error


def _schema(path: Path, layout: NotebookLayout, dtypes: dict[str, str]) -> Schema:
    _, n_tokens, n_dims = layout.tensors["W"].shape
    itemsizes = {name: storage_dtype(native).itemsize for name, native in dtypes.items()}
    saved = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return Schema(
        shape=(n_tokens, n_dims),
        dims=TOKEN_DIMS,
        dtypes=dtypes,
        layout=plan_layout(n_tokens, n_dims, itemsizes),
        optimizer=Adam(name="AdamW", implementation="single", decoupled_weight_decay=True),
        device="unknown",
        created=saved.isoformat(timespec="seconds"),
        attrs={"config": layout.config(), NOTEBOOK_FILE: layout.to_attribute()},
    )
