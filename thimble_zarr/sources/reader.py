"""The reader of other people's files: a run is read in place, a few rows at a time.

`layouts` say where its rows are. The gradient of the initial state is missing here, whatever a file
has there. Files keep as float32 what of bfloat16 weights is bfloat16: where half of every number is
zero, that half is left out.
"""

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.bits import fill_value, storage_dtype
from thimble_zarr.errors import DamagedStoreError, NotAStoreError
from thimble_zarr.format.indexing import Indices, as_slice, is_ascending
from thimble_zarr.format.layout import Layout, plan_layout
from thimble_zarr.format.reader import History, Recording, State
from thimble_zarr.format.schema import SOURCE_FILE, TOKEN_DIMS, Json, Schema, TokenLabels
from thimble_zarr.format.stored_array import LoggedArray
from thimble_zarr.optim.programs.kernel import StepNumbers
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.optim.specs.adam import Adam
from thimble_zarr.sources.containers.array import FileArray, named_errors
from thimble_zarr.sources.recorded import RecordedRun, Series
from thimble_zarr.sources.registry import contents_of, layout_of
from thimble_zarr.sources.rules import HYPERPARAMETERS
from thimble_zarr.store.reader import StorePath

_MAYBE_NARROW = (("grad",), ("exp_avg", "exp_avg_sq"))
"""Variables that have one dtype in torch, and are float32 in files where that is bfloat16."""

_WHOLE_ROW_STEPS = 8
"""Steps a block of what can only be read in whole rows: so a window has few of them."""


@dataclass(frozen=True)
class FileReader:
    """A run in a file, read in place. Made by `open_each`; small to pickle.

    What the file does not say (versions, device) is not in `schema`, or is unknown there.
    """

    path: Path
    schema: Schema
    kind: str
    run: RecordedRun = field(compare=False)
    labels: TokenLabels = field(compare=False)
    learning_rate: np.ndarray | None = field(default=None, compare=False)
    opened_as: str = field(default="", compare=False)

    recording: ClassVar = Recording(State.CLOSED)
    integrity: ClassVar = None  # the file has no checksums

    @classmethod
    def open_each(cls, path: StorePath) -> list[Self]:
        """Open the runs in a file. Of big arrays a few rows are looked at.

        Raises NotAStoreError or DamagedStoreError if it is none that is known or was cut off,
        StoreError if it cannot be read, and ConfigError if a package is missing that reads it.
        """
        path = Path(path).absolute()
        if not path.exists():
            raise NotAStoreError(f"there is nothing at {path}; check the path")
        with named_errors(path):
            opened_as = _identity(path)
            contents = contents_of(path)
            layout = layout_of(contents)
            readers = []
            for run in layout.runs(contents):
                schema = _schema(path, layout.kind, run, _dtypes(run))
                reader = cls(path, schema, layout.kind, run, run.labels, opened_as=opened_as)
                reader._check_first_gradient()
                reader._check_first_states()
                last = reader.n_rows - 1
                readers.append(reader.narrowed((min(1, last), last // 2, last)))
        return readers

    @property
    def group(self) -> str:
        """The name of the run, if the file has several."""
        return self.schema.parameter or ""

    def labelled(self, labels: TokenLabels) -> Self:
        """Return the reader with labels of the whole vocabulary.

        Raises ConfigError if there are not as many as tokens.
        """
        labels.check_length(self.run.whole_tokens or self.schema.n_tokens)
        ids = self.run.token_ids
        return replace(self, labels=labels if ids is None else labels.of(ids))

    def _check_first_gradient(self) -> None:
        grad = self.run.series.get("grad")
        if grad is None or grad.shift:
            return
        if next(_file_rows(grad, range(1))).any():
            raise NotAStoreError(
                f"{grad.name} of row 0, the initial state, is not zero; row t must have the "
                "gradient that step t consumed, and row 0 has none"
            )

    def _check_first_states(self) -> None:
        """Raise NotAStoreError if states of steps 1 to N look like those of 0 to N-1."""
        for name in ("exp_avg", "exp_avg_sq"):
            series = self.run.series.get(name)
            if series is None or not series.shift or len(series.rows) < 2:
                continue
            if [row.any() for row in _file_rows(series, range(2))] == [False, True]:
                raise NotAStoreError(
                    f"{series.name} has a row less than W, as of steps 1 to {self.n_rows - 1:,}, "
                    "but begins with zeros, as of the initial state; which steps it is of cannot "
                    "be told"
                )

    def narrowed(
        self, rows: Iterable[int], *, on_bytes: Callable[[int], object] = lambda n_bytes: None
    ) -> Self:
        """Return the reader whose variables are bfloat16 that are so in all of these rows."""
        dtypes, rows = _dtypes(self.run), [*rows]
        for names in maybe_narrow(self.run):
            if all(_is_narrow(self.run.series[name], rows, on_bytes) for name in names):
                dtypes |= dict.fromkeys(names, "bfloat16")
        return replace(self, schema=_schema(self.path, self.kind, self.run, dtypes))

    @property
    def narrow_states(self) -> bool:
        """Whether the moments are float32 in the file and bfloat16 here."""
        in_file = _dtypes(self.run).get("exp_avg")
        return in_file is not None and in_file != self.schema.dtypes["exp_avg"]

    def chunk_checksums(self) -> None:
        """Return None: the file has no checksums."""

    @property
    def n_rows(self) -> int:
        """Rows of the run: the initial state and one for each step."""
        return self.run.n_rows

    @property
    def whole_rows(self) -> range:
        """Rows of which the file has weights and states, and but for the first the gradient."""
        return self.schema.whole_rows(self.n_rows)

    @property
    def identity(self) -> str:
        """What the file is known by: its size, and when it was written."""
        return _identity(self.path)

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

        Raises DamagedStoreError if the file was changed since it was opened, or numbers that were
        taken for bfloat16 are none, and StoreError if it cannot be read.
        """
        with self.opened() as opened:
            return opened.read(name, rows, tokens, out)

    @contextmanager
    def opened(self) -> Iterator["OpenedFile"]:
        """Return the same rows for one thread; the file is opened once for each variable."""
        with ExitStack() as files:
            self._check_same()
            yield OpenedFile(self, files)
            self._check_same()

    def _check_same(self) -> None:
        """Raise DamagedStoreError if the file is another one than was opened."""
        with named_errors(self.path):
            if self.identity != self.opened_as:
                raise DamagedStoreError("it was changed after it was opened; open it again")

    def read_scalars(self) -> dict[str, np.ndarray]:
        """Return every per-step scalar; NaN of what the file does not say."""
        rows = np.arange(self.n_rows, dtype=np.float64)
        known = {name: np.full(self.n_rows, np.nan) for name in self.schema.scalars}
        known["optimizer_step"] = rows
        if self.run.loss is not None:
            known["loss"] = self.run.loss
        for name, setting in HYPERPARAMETERS.items():
            value = self.run.settings.get(setting)
            if isinstance(value, int | float):
                known[name] = np.where(rows > 0, float(value), np.nan)
        if self.learning_rate is not None:
            known["learning_rate"] = self.learning_rate
        return known

    def read_logged(self) -> dict[str, np.ndarray]:
        """Return what was logged besides the loss."""
        return dict(self.run.logged)

    def read_steps(self) -> np.ndarray:
        """Return the step of each row."""
        return np.arange(self.n_rows)

    def read_token_ids(self) -> np.ndarray:
        """Return which row of the parameter each token is."""
        ids = self.run.token_ids
        return np.arange(self.schema.n_tokens) if ids is None else ids

    def read_labels(self) -> TokenLabels:
        """Return what is known of the tokens."""
        return self.labels

    def read_history(self) -> History:
        """Return an empty history: the file has none."""
        return History()

    def disk_bytes(self) -> int:
        """Return the size of the file."""
        return self.path.stat().st_size


class OpenedFile:
    """The rows of a run for one thread, while `files` are open."""

    def __init__(self, reader: FileReader, files: ExitStack) -> None:
        self._reader, self._files, self._opened = reader, files, dict[str, Any]()

    def will_read(self, names: Sequence[str], rows: tuple[int, int], tokens: Indices) -> None:
        """Tell the disk of what is there of these rows."""
        ids = np.asarray(tokens)
        for series in map(self._reader.run.series.__getitem__, names):
            there = _there(series, rows)
            if there and len(ids):
                with named_errors(self._reader.path):
                    opened = self._of(series)
                for columns, _ in _columns(series.array, ids):
                    series.array.will_read(opened, _in_array(series, there), columns)

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return stored bits, as `FileReader.read` does."""
        reader = self._reader
        native, series = reader.schema.dtypes[name], reader.run.series[name]
        ids = np.arange(reader.schema.n_tokens) if tokens is None else np.asarray(tokens)
        dtype = storage_dtype(native).newbyteorder("<")
        shape = (rows[1] - rows[0], len(ids), reader.schema.n_dims)
        bits = _memory(out, shape, dtype)
        if not bits.size:
            return bits.astype(storage_dtype(native), copy=False)
        there = _there(series, rows)
        bits[: there.start - rows[0]] = fill_value(native)
        bits[max(0, there.stop - rows[0]) :] = fill_value(native)
        if there:
            into = bits[there.start - rows[0] : there.stop - rows[0]]
            with named_errors(reader.path):
                for columns, some in _columns(series.array, ids):
                    self._read(series, native, there, columns, ids[some], into[:, some])
        return bits.astype(storage_dtype(native), copy=False)

    def read_together(
        self, outs: Mapping[str, np.ndarray], rows: tuple[int, int], tokens: Indices
    ) -> dict[str, np.ndarray]:
        """Return stored bits of several variables, in the memory that is given."""
        return {name: self.read(name, rows, tokens, out) for name, out in outs.items()}

    def predicted(
        self,
        rows: tuple[int, int],
        tokens: Indices,
        program: PortableProgram,
        numbers: StepNumbers,
    ) -> np.ndarray:
        """Return that no row is known to be what a program makes of the row before."""
        return np.zeros(rows[1] - rows[0], bool)

    def _of(self, series: Series) -> Any:
        """Return the open file of an array."""
        if series.name not in self._opened:
            self._opened[series.name] = self._files.enter_context(series.array.opened())
        return self._opened[series.name]

    def _read(
        self,
        series: Series,
        native: str,
        rows: range,
        columns: tuple[int, int],
        ids: np.ndarray,
        bits: np.ndarray,
    ) -> None:
        """Read tokens and what is between them: straight into place where nothing is."""
        array, opened, at = series.array, self._of(series), _in_array(series, rows)
        wanted, is_narrow = as_slice(ids - columns[0]), array.native != native
        if isinstance(wanted, slice) and not is_narrow:
            array.read_rows(opened, at, columns, bits)
            return
        part = np.empty((1, columns[1] - columns[0], *array.shape[2:]), array.dtype)
        for row, in_array, into in zip(rows, at, bits, strict=True):
            array.read_rows(opened, range(in_array, in_array + 1), columns, part)
            found = part[0] if isinstance(wanted, slice) else part[0].take(wanted, axis=0)
            into[...] = _narrow(found, series.name, row) if is_narrow else found


def _there(series: Series, rows: tuple[int, int]) -> range:
    """Return which of some rows of the run are there."""
    return range(max(rows[0], series.rows.start), min(rows[1], series.rows.stop))


def _in_array(series: Series, rows: range) -> range:
    """Return which rows of the array some rows of the run are."""
    return range(rows.start - series.shift, rows.stop - series.shift)


def _columns(array: FileArray, ids: np.ndarray) -> Iterator[tuple[tuple[int, int], slice]]:
    """Yield columns that are read at once, from the first to before the last, and whose they are.

    Where two ascending tokens are far apart, what is between them is not read.
    """
    ends = np.empty(0, np.int64)
    if not array.has_whole_rows and is_ascending(ids):
        token_bytes = prod(array.shape[2:]) * array.dtype.itemsize
        ends = np.flatnonzero(np.diff(ids) * token_bytes > tuning.TUNING.near_bytes) + 1
    for start, stop in pairwise((0, *ends.tolist(), len(ids))):
        some = slice(start, stop)
        yield (int(ids[some].min()), int(ids[some].max()) + 1), some


def _identity(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"


def _memory(out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the memory of `out` in the order in which files have rows, or else fresh memory.

    Who offers `out` has it in the order in which stores have rows: token by token.
    """
    if out is not None and out.dtype == dtype:
        for order in (out, out.transpose(1, 0, 2)):
            if order.flags.c_contiguous:
                return order.reshape(shape)
    return np.empty(shape, dtype)


def _narrow(bits: np.ndarray, name: str, step: int) -> np.ndarray:
    """Return the bfloat16 bits of float32 numbers."""
    halves = bits.view("<u2")
    if halves[..., ::2].any():
        raise DamagedStoreError(
            f"{name} has float32 numbers at step {step}, and bfloat16 numbers only in the rows "
            "that were looked at first; `thimble-zarr import` looks at all of them, and the store "
            "it makes can be read"
        )
    return halves[..., 1::2]


def _file_rows(series: Series, rows: Iterable[int]) -> Iterator[np.ndarray]:
    """Yield whole rows of an array, in one and the same memory."""
    array = series.array
    bits = np.empty((1, *array.shape[1:]), array.dtype)
    with array.opened() as opened:
        for row in rows:
            array.read_rows(opened, range(row, row + 1), (0, array.shape[1]), bits)
            yield bits[0]


def _is_narrow(series: Series, rows: Iterable[int], on_bytes: Callable[[int], object]) -> bool:
    """Return whether some rows have numbers of bfloat16 only: their low half is zero."""
    at = [row - series.shift for row in rows if row in series.rows]
    for bits in _file_rows(series, at):
        if bits.view("<u2")[..., ::2].any():
            return False
        on_bytes(bits.nbytes)
    return True


def maybe_narrow(run: RecordedRun) -> list[tuple[str, ...]]:
    """Return the variables that are float32 in a file and may be bfloat16, as those of one dtype.

    They may be that where the weights are.
    """
    dtypes = _dtypes(run)
    if dtypes["W"] != "bfloat16":
        return []
    there = [tuple(name for name in names if name in dtypes) for names in _MAYBE_NARROW]
    return [names for names in there if names and {dtypes[of] for of in names} == {"float32"}]


def _dtypes(run: RecordedRun) -> dict[str, str]:
    """Return the dtypes of the variables as they are in the file."""
    return {name: str(of.array.native) for name, of in run.series.items()}


def _whole_rows(run: RecordedRun) -> range:
    """Return the rows of which a file has weights and states, and but for the first the gradient.

    Where there are no states, nothing is missing of a row.
    """
    start = max(of.rows.start for name, of in run.series.items() if name != "grad")
    return range(start, min(of.rows.stop for of in run.series.values()))


def _schema(path: Path, kind: str, run: RecordedRun, dtypes: dict[str, str]) -> Schema:
    _, n_tokens, n_dims = run.series["W"].array.shape
    itemsizes = {name: storage_dtype(native).itemsize for name, native in dtypes.items()}
    layout = plan_layout(n_tokens, n_dims, itemsizes)
    if any(of.array.has_whole_rows for of in run.series.values()):
        layout = Layout(min(_WHOLE_ROW_STEPS, layout.block_steps), n_tokens)
    saved = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    about: dict[str, Json] = {"name": path.name, "layout": kind}
    if (whole := _whole_rows(run)) != range(run.n_rows):
        about["whole_rows"] = [whole.start, whole.stop]
    if run.not_taken:
        about["not_taken"] = ", ".join(run.not_taken)
    if run.caveat is not None:
        about["caveat"] = run.caveat
    return Schema(
        shape=(n_tokens, n_dims),
        dims=TOKEN_DIMS,
        dtypes=dtypes,
        layout=layout,
        optimizer=Adam(name="AdamW", implementation="single", decoupled_weight_decay=True),
        parameter=run.parameter,
        device=run.device,
        whole_tokens=run.whole_tokens,
        created=saved.isoformat(timespec="seconds"),
        attrs={"config": dict(run.settings), **(run.attrs or {SOURCE_FILE: about})},
        logged={name: LoggedArray(of.shape[1:], of.dtype.name) for name, of in run.logged.items()},
    )
