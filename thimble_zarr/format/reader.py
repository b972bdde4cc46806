"""What the analysis asks of a recording, wherever it lies: a store of ours or another's file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np

from thimble_zarr.errors import StoreError
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.location import Location
from thimble_zarr.format.overhead import Overhead
from thimble_zarr.format.schema import Schema, TokenLabels
from thimble_zarr.optim.programs.kernel import StepNumbers
from thimble_zarr.optim.programs.program import PortableProgram


@dataclass(frozen=True)
class Checksums:
    """What a chunk is known by: crc32c of its bytes as they are stored, and of its values.

    The first follows the chunk in its file. Two chunks that differ in a single bit differ in the
    second by what tells which bit (`locate_bit`).
    """

    stored: int
    values: int


@dataclass(frozen=True)
class AlteredChunk:
    """A chunk whose values are not those that were committed.

    Attributes
    ----------
    variable, file, n_chunks
        Whose chunk it is, the key of its file, and the chunks of that.
    recorded_as
        The file that was recorded with the contents that this one has now, None if none was.
    first_row
        Where it begins; 0 of labels.
    chunk, tokens, committed
        Which chunk it is of the rows there, the tokens in it, and the checksums it had; None of
        scalars and labels.
    """

    variable: str
    file: str
    n_chunks: int
    recorded_as: str | None
    first_row: int
    chunk: int | None
    tokens: Indices | None
    committed: Checksums | None


class Rows(Protocol):
    """The rows of a recorded run while one thread reads them."""

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return stored bits as `Reader.read` does."""

    def read_together(
        self, outs: Mapping[str, np.ndarray], rows: tuple[int, int], tokens: Indices
    ) -> Mapping[str, np.ndarray]:
        """Return stored bits of several variables, each as `Reader.read` does."""

    def predicted(
        self,
        rows: tuple[int, int],
        tokens: Indices,
        program: PortableProgram,
        numbers: StepNumbers,
    ) -> np.ndarray:
        """Return which rows are read by having a program take the step from the row before.

        So nobody need take it again to know that it leads there. `numbers` are those of the rows;
        a step with other numbers is not that step. Bool, shape `(step,)`.
        """

    def will_read(self, names: Sequence[str], rows: tuple[int, int], tokens: Indices) -> None:
        """Say that `read` will be asked for these, so that the disk may begin.

        At most an index is read for it. What is wrong with a file is told when that is read.
        """


class RowReader(Protocol):
    """Rows of a run, in memory or where they were recorded."""

    @property
    def schema(self) -> Schema:
        """What was recorded, and by what."""

    @property
    def n_rows(self) -> int:
        """Rows that can be read: the initial state and each step, as far as they are recorded."""

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return stored bits of a variable, of a range of rows and of tokens in any order.

        The dtype is `storage_dtype(schema.dtypes[name])`, the shape `(step, token, dim)`; the array
        is the caller's. It may be `out`, an array of that shape and dtype.
        """

    def read_scalars(self) -> dict[str, np.ndarray]:
        """Return every per-step scalar: float64, shape `(n_rows,)`, NaN where missing."""

    def read_steps(self) -> np.ndarray:
        """Return the step of each row, ascending: int64, shape `(n_rows,)`."""

    def read_token_ids(self) -> np.ndarray:
        """Return which row of the parameter each token is, ascending: int64, shape `(token,)`."""

    def read_history(self) -> "History":
        """Return what recording took and where it was resumed, as far as that was noted."""


class Reader(RowReader, Protocol):
    """The rows of a recorded run. Small to pickle, safe to share by threads."""

    @property
    def path(self) -> Location:
        """Where the recording lies."""

    @property
    def group(self) -> str:
        """The parameter's name, if the recording holds several; else empty."""

    @property
    def kind(self) -> str:
        """What kind of recording it is, and whether it has ended, in words."""

    @property
    def recording(self) -> "Recording":
        """Whether the recording has ended, and if not, who is or was recording."""

    @property
    def integrity(self) -> "Integrity | None":
        """What compares the recording with what was recorded; None where nothing can."""

    def chunk_checksums(self) -> "ChunkChecksums | None":
        """Return what chunks of equal values are recognised by; None where nothing was noted."""

    @property
    def whole_rows(self) -> range:
        """Rows of which every variable is there that the recording has: of a store all.

        Some files have states of the first steps only.
        """

    @property
    def identity(self) -> str:
        """What the rows that can be read are known by: other rows have another."""

    def rows_since(self, identity: str) -> int:
        """Return how many of the first rows are those of a recording of that identity.

        It is that of this recording at another time, or of what lay at its path; 0 where nothing is
        known of it. There may be more rows than one of the two has.
        """

    def opened(self) -> AbstractContextManager[Rows]:
        """Return the same rows for one thread, which has files kept open while it reads a few."""

    def read_labels(self) -> TokenLabels:
        """Return what is known of the tokens."""

    def read_logged(self) -> dict[str, np.ndarray]:
        """Return what was logged besides the loss, shape `(n_rows, ...)`, NaN where nothing was."""

    def disk_bytes(self) -> int:
        """Return the size of the recording where it lies."""


class ChunkChecksums(Protocol):
    """What was noted of the values of each chunk when it was recorded."""

    def of_block(self, name: str, row: int) -> np.ndarray | None:
        """Return the checksums of a variable's chunks in the block of a row: uint32.

        They are in the order in which the chunks lie on disk, and cover all rows of the block, as
        torch held them, in native precision. None where they cannot be relied on.
        """


class Integrity(Protocol):
    """Compares a recording with the checksums that were taken when it was recorded."""

    def altered_chunks(
        self, rows: tuple[int, int], *, before_block: Callable[[int], object] | None = None
    ) -> Iterator[AlteredChunk]:
        """Find chunks whose values are not those that were recorded.

        Before each block `before_block` is called with the row it ends before, and may wait.
        """

    def flipped_bit(self, altered: AlteredChunk) -> tuple[int, int, int, int] | None:
        """Return row, token, dim and bit, if one flipped bit is all that altered a chunk.

        It takes seconds.
        """


@dataclass(frozen=True)
class History:
    """How a run was recorded.

    Attributes
    ----------
    overhead
        What recording took, of all parameters together, by the first row of each measured block.
    resumed_after
        The steps after which the run was resumed, in the order in which that was done.
    audits
        How many steps were audited while they were recorded, by the first row of each block of
        which that is known.
    filled, missing
        Rows, each as `(first, stop)`, of which only the gradient was copied. Their `W` and states
        were worked out from one keyframe to the next, or could not be (`record.replay.keyframes`).
    """

    overhead: Mapping[int, Overhead] = field(default_factory=dict)
    resumed_after: Sequence[int] = ()
    audits: Mapping[int, AuditCounts] = field(default_factory=dict)
    filled: Sequence[tuple[int, int]] = ()
    missing: Sequence[tuple[int, int]] = ()


class State(Enum):
    """How far a recording has come."""

    CLOSED = "closed"
    RECORDING = "recording"
    UNKNOWN = "unknown"
    CUT_OFF = "cut-off"


@dataclass(frozen=True)
class Recording:
    """Whether a recording has ended, and if not, who is or was recording.

    Attributes
    ----------
    state
        `UNKNOWN` of a recording that a process on another machine may still make.
    writer
        Who left its name, in words; None where nobody did. A writer that ends removes it.
    """

    state: State
    writer: str | None = None

    def __str__(self) -> str:
        by = f" by {self.writer}" if self.writer else ""
        gone = f"its writer, {self.writer}, is gone" if self.writer else "it has no writer"
        return {
            State.CLOSED: "closed",
            State.RECORDING: f"being recorded{by}",
            State.UNKNOWN: f"being recorded{by}, or cut off",
            State.CUT_OFF: f"cut off: {gone}",
        }[self.state]

    def why_empty(self, *, is_imported: bool) -> str:
        """Return why nothing is committed, as far as that is known, and what to do."""
        if self.state is not State.CUT_OFF:
            is_known = self.state is State.RECORDING
            return (
                f"{self.writer or 'a process'} {'is' if is_known else 'may be'} recording into it "
                "and commits nothing before its first block is full; try again then"
            )
        gone = "nobody is recording into it"
        if self.writer is not None:
            gone = f"its writer, {self.writer}, is gone"
        if is_imported:
            return f"{gone}; import the file again, with --overwrite"
        return (
            f"{gone}; resume it (`thimble-zarr train --resume`, resume=True) or replace it "
            "(--overwrite, overwrite=True)"
        )


def not_begun(reader: Reader) -> StoreError:
    """Return the error of who needs a row of a recording that has none."""
    why = reader.recording.why_empty(is_imported=reader.schema.is_imported)
    return StoreError(f"{reader.path} has no committed step yet: {why}")
