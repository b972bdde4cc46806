"""The file of the original notebook: one safetensors file with everything in it.

`W`, `grad_W`, `momentum_W` and `variance_W` have a row for the initial state and one for each step;
beside them lie the losses and, as tensors without dimensions, the hyper-parameters. The gradient of
the initial state is zero there, and missing here. The notebook kept the moments as float32 although
those of bfloat16 weights are bfloat16: where half of every number is zero, that half is left out.

`NotebookReader` reads such a file in place. Import and export go block by block in bounded memory,
and a file that was imported is exported again byte for byte: what a store has no place for is kept
in its attribute `notebook_file`.
"""

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from thimble_zarr.bits import decode, fill_value, storage_dtype
from thimble_zarr.errors import (
    ConfigError,
    DamagedStoreError,
    NotAStoreError,
    StoreError,
    StoreExistsError,
    ThimbleError,
)
from thimble_zarr.format.indexing import Indices, TokenGroup, as_slice, token_groups
from thimble_zarr.format.layout import Layout, plan_layout, split_range
from thimble_zarr.format.reader import History, Reader, Recording, State, not_begun
from thimble_zarr.format.schema import SCALARS, TOKEN_DIMS, OptimizerInfo, Schema, TokenLabels
from thimble_zarr.interrupts import interrupts_held
from thimble_zarr.sources.notebook.contents import (
    CONFIG,
    FILE_NAMES,
    FLOAT_SCALARS,
    HYPERPARAMETERS,
    LOSSES,
    NATIVE,
    NOTEBOOK_FILE,
    STATES,
    Contents,
    read_bits,
)
from thimble_zarr.sources.notebook.header import DTYPES, Header, Tensor, read_header, read_into
from thimble_zarr.store.reader import StorePath, StoreReader

if TYPE_CHECKING:
    from thimble_zarr.store.writer import StoreWriter

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes to do."""


@dataclass(frozen=True)
class NotebookReader:
    """The rows of a notebook's file, read in place. Made by `open`; small to pickle.

    Attributes
    ----------
    path
        The file.
    schema
        What it holds. What it does not say (versions, device) is not there.
    tensors
        Where everything lies in the file, by the notebook's names.
    hyperparameters
        Per-step scalars that are the same for every step.
    labels
        What is known of the tokens; the file itself knows nothing of them.
    """

    path: Path
    schema: Schema
    tensors: Mapping[str, Tensor]
    hyperparameters: Mapping[str, float]
    labels: TokenLabels = field(default_factory=TokenLabels, compare=False)

    kind: ClassVar = "the notebook's file"
    recording: ClassVar = Recording(State.CLOSED)
    integrity: ClassVar = None  # the file has no checksums

    @classmethod
    def open(cls, path: StorePath, *, labels: TokenLabels | None = None) -> Self:
        """Open a notebook's file. Of the big tensors a few rows are looked at.

        Parameters
        ----------
        path
            The safetensors file.
        labels
            Labels of the tokens, such as a token mask gives.

        Raises
        ------
        NotAStoreError
            If it is not a safetensors file, or not one of the notebook.
        DamagedStoreError
            If it was cut off.
        ConfigError
            If there are not as many labels as tokens.
        StoreError
            If it cannot be read.
        """
        path, labels = Path(path).absolute(), labels or TokenLabels()
        if not path.exists():
            raise NotAStoreError(f"there is nothing at {path}; check the path")
        try:
            header = read_header(path)
            contents = Contents.read(path, header)
            schema = _schema(path, contents)
            reader = cls(path, schema, header.tensors, contents.hyperparameters(), labels)
            reader._check_initial_gradient()
            last = reader.n_rows - 1
            reader = reader._with_narrow_states((min(1, last), last // 2, last))
        except (NotAStoreError, DamagedStoreError) as error:
            raise type(error)(f"cannot read {path}: {error}") from error
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
        labels.check_length(reader.schema.n_tokens)
        return reader

    @property
    def n_rows(self) -> int:
        """Rows of the file: the initial state and one for each step."""
        return self.tensors["W"].shape[0]

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read the bits of a variable, as a store would hold them.

        Besides what it returns it takes the memory of two rows.

        Parameters
        ----------
        name
            One of the variables of the schema.
        rows
            `(start, stop)`, within the rows.
        tokens
            In any order. All by default.
        out
            Of no use here.

        Returns
        -------
        numpy.ndarray
            Shape `(step, token, dim)`, dtype `storage_dtype` of the variable. The gradient of row 0
            is missing.

        Raises
        ------
        DamagedStoreError
            If the file was cut off since it was opened, or numbers that were taken for bfloat16 are
            none.
        StoreError
            If the file cannot be read.
        """
        native = self.schema.dtypes[name]
        tokens = range(self.schema.n_tokens) if tokens is None else tokens
        shape = (rows[1] - rows[0], len(tokens), self.schema.n_dims)
        stored = np.empty(shape, storage_dtype(native).newbyteorder("<"))
        try:
            if stored.size:
                self._fill(stored, name, rows[0], np.asarray(tokens))
        except DamagedStoreError as error:
            raise DamagedStoreError(f"cannot read {self.path}: {error}") from error
        except OSError as error:
            raise StoreError(f"cannot read {self.path}: {error.strerror or error}") from error
        if name == "grad" and rows[0] == 0:
            stored[:1] = fill_value(native)
        return stored.astype(storage_dtype(native), copy=False)

    def opened(self) -> AbstractContextManager[Self]:
        """Return these rows: nothing stays open."""
        return nullcontext(self)

    def will_read(self, names: Sequence[str], rows: tuple[int, int], tokens: Indices) -> None:
        """Do nothing: rows lie one after the other, so that the system reads ahead by itself."""

    def read_scalars(self) -> dict[str, np.ndarray]:
        """Return every per-step scalar: float64, shape `(n_rows,)`, NaN where missing."""
        rows = np.arange(self.n_rows, dtype=np.float64)
        losses = self.tensors[LOSSES]
        known = {
            name: np.where(rows > 0, value, np.nan) for name, value in self.hyperparameters.items()
        } | {
            "loss": decode(read_bits(self.path, losses), NATIVE[losses.dtype], np.float64),
            "optimizer_step": rows,
        }
        return {name: known[name] for name in SCALARS}

    def read_steps(self) -> np.ndarray:
        """Return the step of each row: int64, shape `(n_rows,)`."""
        return np.arange(self.n_rows)

    def read_token_ids(self) -> np.ndarray:
        """Return which row of the parameter each token is: int64, shape `(token,)`."""
        return np.arange(self.schema.n_tokens)

    def read_labels(self) -> TokenLabels:
        """Return what is known of the tokens."""
        return self.labels

    def token_groups(self, tokens: Indices, most: int) -> list[TokenGroup]:
        """Return tokens in groups of at most `most`, or of one chunk, that share few chunks."""
        chunk_tokens = self.schema.layout.chunk_tokens
        return token_groups(tokens, most, places=None, chunk_tokens=chunk_tokens)

    def read_history(self) -> History:
        """Return an empty history: the file has none."""
        return History()

    def disk_bytes(self) -> int:
        """Return the size of the file."""
        return self.path.stat().st_size

    def _fill(self, stored: np.ndarray, name: str, first_row: int, tokens: np.ndarray) -> None:
        tensor = self.tensors[FILE_NAMES[name]]
        row_bytes, token_bytes = _row_bytes(tensor), _row_bytes(tensor) // tensor.shape[1]
        first, end = int(tokens.min()), int(tokens.max()) + 1
        wanted = as_slice(tokens - first)
        narrow = NATIVE[tensor.dtype] != self.schema.dtypes[name]
        shape = (end - first, self.schema.n_dims, 2) if narrow else (end - first, *stored.shape[2:])
        numbers = np.empty(shape, "<u2" if narrow else stored.dtype)
        with self.path.open("rb", buffering=0) as stream:
            for row, target in enumerate(stored, first_row):
                stream.seek(tensor.offset + row * row_bytes + first * token_bytes)
                read_into(stream, numbers)
                if not narrow:
                    target[...] = numbers[wanted]
                    continue
                if numbers[..., 0].any():
                    raise DamagedStoreError(
                        f"{FILE_NAMES[name]} has float32 numbers at step {row}, and bfloat16 "
                        "numbers only in the rows that were looked at first; `thimble-zarr import` "
                        "looks at all of them, and the store it makes can be read"
                    )
                target[...] = numbers[wanted, :, 1]

    def _check_initial_gradient(self) -> None:
        grad = self.tensors[FILE_NAMES["grad"]]
        if read_bits(self.path, replace(grad, shape=(1, *grad.shape[1:]))).any():
            raise NotAStoreError(
                "grad_W of row 0, the initial state, is not zero; the notebook's row t has the "
                "gradient that step t consumed, and row 0 has none"
            )

    def _with_narrow_states(
        self, rows: Iterable[int], on_bytes: Callable[[int], None] = lambda n_bytes: None
    ) -> Self:
        """Return the reader whose states are bfloat16 if they are so in all of these rows."""
        tensors = [self.tensors[FILE_NAMES[name]] for name in STATES]
        if any(tensor.dtype != "F32" for tensor in tensors):
            return self
        narrow = all(_is_bfloat16(self.path, tensor, rows, on_bytes) for tensor in tensors)
        states = dict.fromkeys(STATES, "bfloat16" if narrow else "float32")
        dtypes = {**self.schema.dtypes, **states}
        layout = _plan(self.schema.n_tokens, self.schema.n_dims, dtypes)
        return replace(self, schema=replace(self.schema, dtypes=dtypes, layout=layout))


def has_narrow_states(schema: Schema) -> bool:
    """Return whether the moments are float32 in the notebook's file and bfloat16 here."""
    attribute = schema.attrs.get(NOTEBOOK_FILE)
    if attribute is None:
        return False
    tensors = Contents.from_attribute(attribute).tensors
    return any(NATIVE[tensors[FILE_NAMES[name]].dtype] != schema.dtypes[name] for name in STATES)


def import_notebook(
    file: Path,
    path: StorePath,
    *,
    labels: TokenLabels | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> StoreReader:
    """Make a store of a notebook's file, block by block. A failure leaves nothing, nor does Ctrl-C.

    Parameters
    ----------
    file
        The safetensors file.
    path
        Store to create.
    labels
        Labels of the tokens, such as a token mask gives.
    overwrite
        Replace a store that lies at `path`.
    on_progress
        Called as bytes are read.

    Returns
    -------
    StoreReader
        The store.

    Raises
    ------
    NotAStoreError, DamagedStoreError
        If the file is not one of the notebook, or was cut off.
    ConfigError
        If the labels are not of as many tokens, or the file has a big tensor beside the notebook's.
    StoreExistsError, StoreError
        If the store cannot be created or written, or the file cannot be read.
    """
    from thimble_zarr.store.writer import StoreWriter, check_vacant  # not where it only reads

    check_vacant(path, overwrite=overwrite)
    reader = NotebookReader.open(file, labels=labels)
    Contents.from_attribute(reader.schema.attrs[NOTEBOOK_FILE]).check_all_kept()
    big = {name: reader.tensors[FILE_NAMES[name]].n_bytes for name in FILE_NAMES}
    n_scanned = sum(big[name] for name in STATES) if has_narrow_states(reader.schema) else 0
    count = _Count(n_scanned + sum(big.values()), on_progress)
    if n_scanned:
        # The store's dtype must hold every row, and so every row is looked at.
        reader = reader._with_narrow_states(range(reader.n_rows), count.add)
        count.reach(n_scanned)
    schema = reader.schema.labelled(labels)
    undo = ExitStack()
    with _all_or_nothing(Path(path).absolute(), undo.close):
        with interrupts_held():
            writer = StoreWriter.create(
                path, schema, labels=labels, n_rows=reader.n_rows, overwrite=overwrite
            )
            undo.callback(writer.discard)
        scalars = reader.read_scalars()
        for rows in split_range(0, reader.n_rows, reader.schema.layout.block_steps):
            with interrupts_held():
                _commit_rows(writer, reader, rows, scalars)
            count.add(sum(big.values()) * (rows[1] - rows[0]) // reader.n_rows)
        with interrupts_held():
            writer.close()
            undo.pop_all()  # the store is whole, and Ctrl-C comes too late
    return StoreReader.open(path)


def export_notebook(
    reader: Reader, file: Path, *, overwrite: bool = False, on_progress: Progress | None = None
) -> None:
    """Write a recording as the original notebook would have saved it.

    A store that was imported becomes the file it came from, byte for byte if safetensors wrote that
    file. A failure leaves no file.

    Parameters
    ----------
    reader
        A store of a bfloat16 run, such as `thimble-zarr train` makes, or one that was imported.
    file
        Safetensors file to write.
    overwrite
        Replace a safetensors file of that name.
    on_progress
        Called as bytes are written.

    Raises
    ------
    ConfigError
        If the notebook's file cannot hold the run without loss: it is not bfloat16, or its
        hyper-parameters changed.
    StoreExistsError
        If the file exists.
    DamagedStoreError
        If the store cannot be read.
    StoreError
        If the file cannot be written.
    """
    file = file.absolute()
    _check_file_vacant(file, overwrite=overwrite)
    if reader.n_rows == 0:
        raise not_begun(reader)
    attribute = reader.schema.attrs.get(NOTEBOOK_FILE)
    contents = _as_notebook(reader) if attribute is None else Contents.from_attribute(attribute)
    contents.check_all_kept()
    shape = (reader.n_rows, reader.schema.n_tokens, reader.schema.n_dims)
    tensors = dict(contents.tensors) | {
        name: replace(contents.tensors[name], shape=shape) for name in FILE_NAMES.values()
    }
    tensors[LOSSES] = replace(tensors[LOSSES], shape=(reader.n_rows,))
    count = _Count(sum(tensor.n_bytes for tensor in tensors.values()), on_progress)
    partial = file.with_name(f"{file.name}.partial")
    with _all_or_nothing(file, lambda: partial.unlink(missing_ok=True)):
        with partial.open("wb") as stream:
            stream.write(Header(tensors, contents.metadata).to_bytes())
            for name, tensor in tensors.items():
                for part in _parts(reader, name, tensor, contents.kept):
                    stream.write(part)
                    count.add(len(part))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)


@dataclass
class _Count:
    """Adds up bytes and tells of them."""

    n_total: int
    on_progress: Progress | None
    n_done: int = 0

    def add(self, n_bytes: int) -> None:
        self.reach(self.n_done + n_bytes)

    def reach(self, n_bytes: int) -> None:
        self.n_done = n_bytes
        if self.on_progress is not None:
            self.on_progress(self.n_done, self.n_total)


@contextmanager
def _all_or_nothing(path: Path, undo: Callable[[], object]) -> Iterator[None]:
    """Leave nothing where something could not be written whole, also after Ctrl-C."""
    try:
        yield
    except BaseException as error:
        with interrupts_held(), suppress(OSError):
            undo()
        if isinstance(error, OSError) and not isinstance(error, ThimbleError):
            raise StoreError(
                f"cannot write {path}: {error.strerror or error}; nothing was left there"
            ) from error
        raise


def _schema(path: Path, contents: Contents) -> Schema:
    dtypes = {ours: NATIVE[contents.tensors[name].dtype] for ours, name in FILE_NAMES.items()}
    _, n_tokens, n_dims = contents.tensors["W"].shape
    saved = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return Schema(
        shape=(n_tokens, n_dims),
        dims=TOKEN_DIMS,
        dtypes=dtypes,
        layout=_plan(n_tokens, n_dims, dtypes),
        optimizer=OptimizerInfo(name="AdamW", implementation="single", decoupled_weight_decay=True),
        device="unknown",
        created=saved.isoformat(timespec="seconds"),
        attrs={"config": contents.config(), NOTEBOOK_FILE: contents.to_attribute()},
    )


def _plan(n_tokens: int, n_dims: int, dtypes: Mapping[str, str]) -> Layout:
    itemsizes = {name: storage_dtype(native).itemsize for name, native in dtypes.items()}
    return plan_layout(n_tokens, n_dims, itemsizes)


def _row_bytes(tensor: Tensor) -> int:
    return tensor.n_bytes // tensor.shape[0]


def _is_bfloat16(
    path: Path, tensor: Tensor, rows: Iterable[int], on_bytes: Callable[[int], None]
) -> bool:
    """Return whether float32 rows hold only numbers that bfloat16 has: the low half is zero."""
    halves = np.empty((*tensor.shape[1:], 2), "<u2")
    with path.open("rb", buffering=0) as stream:
        for row in rows:
            stream.seek(tensor.offset + row * _row_bytes(tensor))
            read_into(stream, halves)
            if halves[..., 0].any():
                return False
            on_bytes(halves.nbytes)
    return True


def _commit_rows(
    writer: "StoreWriter",
    reader: NotebookReader,
    rows: tuple[int, int],
    scalars: Mapping[str, np.ndarray],
) -> None:
    """Commit one block; a function of its own, so that only one block is in memory."""
    n_rows = rows[1] - rows[0]
    n_missing = reader.schema.layout.block_steps - n_rows
    padding = ((0, n_missing), (0, 0), (0, 0))
    arrays = {}
    for name in reader.schema.dtypes:
        bits = reader.read(name, rows)
        arrays[name] = np.pad(bits, padding) if n_missing else bits
    values = {name: of_run[slice(*rows)] for name, of_run in scalars.items()}
    writer.commit_block(rows[0], n_rows, arrays, values)


def _check_file_vacant(file: Path, *, overwrite: bool) -> None:
    if not file.exists():
        return
    if not overwrite:
        raise StoreExistsError(
            f"{file} exists; choose another name, or overwrite it (--overwrite, or overwrite=True)"
        )
    try:
        read_header(file)
    except DamagedStoreError:
        pass  # a safetensors file that was cut off is no loss
    except OSError as error:
        raise StoreExistsError(
            f"{file} exists and is not a safetensors file, so it is never overwritten; choose "
            "another name"
        ) from error


def _as_notebook(reader: Reader) -> Contents:
    """Return what the notebook would have saved beside the rows, in safetensors' order."""
    _check_fits(reader)
    scalars = _scalars(reader)
    dtypes = {name: "F32" if name in FLOAT_SCALARS else "I64" for name in scalars}
    dtypes |= {LOSSES: "F32"} | dict.fromkeys(FILE_NAMES.values(), "BF16")
    dtypes |= {FILE_NAMES[name]: "F32" for name in STATES}
    by_size = [*DTYPES]
    names = sorted(dtypes, key=lambda name: (by_size.index(dtypes[name]), name))
    return Contents(
        {name: Tensor(dtypes[name], ()) for name in names},
        {name: np.array(scalars[name], DTYPES[dtypes[name]]).tobytes() for name in scalars},
    )


def _check_fits(reader: Reader) -> None:
    """Raise ConfigError if the notebook's file has no place for something of the recording."""
    schema, scalars = reader.schema, reader.read_scalars()
    if len(schema.shape) != 2:
        raise ConfigError(
            f"{reader.path} holds a parameter of shape {schema.shape}, and the notebook's file an "
            "embedding of shape (token, dim) only"
        )
    missing = [name for name in FILE_NAMES if name not in schema.dtypes]
    choices = {
        f"no {', '.join(missing)}": bool(missing),
        "only some of its tokens": schema.whole_tokens is not None,
        "only some of its steps": schema.schedule is not None,
    }
    if chosen := [words for words, made in choices.items() if made]:
        raise ConfigError(
            f"{reader.path} has {' and '.join(chosen)}, and the notebook's file needs all of a "
            "run; export one that was recorded whole"
        )
    if set(schema.dtypes.values()) != {"bfloat16"}:
        raise ConfigError(
            f"{reader.path} holds {schema.dtypes['W']}, and the notebook's file bfloat16 "
            "weights only; a copy would lose precision"
        )
    lost = [name for name in schema.dtypes if name not in FILE_NAMES]
    lost += [name for name in HYPERPARAMETERS if len(np.unique(scalars[name][1:])) > 1]
    if not np.array_equal(scalars["optimizer_step"], np.arange(reader.n_rows)):
        lost.append("optimizer_step")
    if lost:
        raise ConfigError(
            f"{reader.path} has {', '.join(lost)} by step, for which the notebook's file has no "
            "place; a copy would not be the same run"
        )
    if not schema.optimizer.decoupled_weight_decay and scalars["weight_decay"][1:].any():
        raise ConfigError(
            f"{reader.path} was trained with L2 decay, and the notebook's file is of AdamW, whose "
            "decay is decoupled; a copy would not be the same run"
        )


def _scalars(reader: Reader) -> dict[str, float]:
    schema, labels, recorded = reader.schema, reader.read_labels(), reader.read_scalars()
    config = schema.attrs.get("config")
    known = config if isinstance(config, Mapping) else {}
    scalars: dict[str, float] = {}
    for name, key in CONFIG.items():
        value = known.get(key)
        if isinstance(value, float if name in FLOAT_SCALARS else int):
            scalars[name] = float(value) if name in FLOAT_SCALARS else int(value)
    if reader.n_rows > 1:
        scalars |= {name: recorded[ours][1] for ours, name in HYPERPARAMETERS.items()}
    scalars |= {
        "vocab_size": schema.n_tokens,
        "hidden_dim": schema.n_dims,
        "num_steps": reader.n_rows - 1,
    }
    if labels.live is not None:
        n_live = int(labels.live.sum())
        scalars |= {"n_live": n_live, "n_dead": schema.n_tokens - n_live}
    return scalars


def _parts(
    reader: Reader, name: str, tensor: Tensor, kept: Mapping[str, bytes]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor of the file, a few rows at a time."""
    if name in kept:
        yield kept[name]
        return
    if name == LOSSES:
        yield _encode_numbers(reader.read_scalars()["loss"], tensor.dtype).tobytes()
        return
    (variable,) = (ours for ours, theirs in FILE_NAMES.items() if theirs == name)
    for rows in split_range(0, reader.n_rows, reader.schema.layout.block_steps):
        bits = reader.read(variable, rows)
        if variable == "grad" and rows[0] == 0:
            bits[0] = 0
        for row in bits:
            yield _widen(row, tensor.dtype).reshape(-1).view(np.uint8).data


def _widen(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Return stored bits in the file's dtype: as they are, or bfloat16 as float32."""
    if bits.dtype == np.uint16 and dtype == "F32":
        bits = bits.astype("<u4") << 16
    return bits.astype(bits.dtype.newbyteorder("<"), copy=False)


def _encode_numbers(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    with np.errstate(over="ignore"):  # a loss beyond float32 is infinite there
        return values.astype(DTYPES[dtype])
