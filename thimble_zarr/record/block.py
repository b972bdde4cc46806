"""A block in memory: rows of everything recorded, filled by training and written whole."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import OptimizerError
from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.format.stored_array import LoggedArray
from thimble_zarr.optim.base import COUNT
from thimble_zarr.record.capture import as_rows, dtype_name, tensor_bits
from thimble_zarr.record.counting import StepCounts, judge_rows
from thimble_zarr.record.transfer import SideStream
from thimble_zarr.store.coding.predicted import derive
from thimble_zarr.store.reader import StoreReader


class Block:
    """Rows `first_row` to `first_row + n_rows - 1` of variables and scalars, by path in the store.

    `steps` has the step of each row, int64, and `scalars` the values of each per-step scalar,
    float64, NaN where missing; the loss of all parameters is one array. What is on a device is
    there when the block is settled: `streams` copy it, by the name of the device. `rows` has by
    group the indices, on their device, of the rows to record, where not all are.

    Of the parameters whose groups are `filled_in` a row may have the gradient only. `is_whole` says
    of each row whether it has everything, `is_late` whether some of that was copied later than its
    step. By group `filled` says which rows were worked out, and `missing` which nobody knows.
    """

    def __init__(
        self,
        schemas: Mapping[str, Schema],
        streams: Mapping[str, SideStream],
        rows: Mapping[str, Tensor],
        filled_in: Collection[str] = (),
    ) -> None:
        self._schemas = schemas
        (self.block_steps,) = {schema.layout.block_steps for schema in schemas.values()}
        self.steps = np.empty(self.block_steps, np.int64)
        self.is_whole, self.is_late = np.ones((2, self.block_steps), bool)
        self.filled, self.missing = _marks(schemas, self.block_steps)
        self._streams = streams
        self._arrived: list[Callable[[], None]] = []
        self._filled_in, self._early = set[str](), set[str]()
        self._stream_of = dict[str, SideStream]()
        self._rows = dict[str, Tensor]()
        self._tensors, self._scalars = dict[str, Tensor](), dict[str, Tensor]()
        loss = torch.empty(self.block_steps, dtype=torch.float64)
        for group, schema in schemas.items():
            stream = streams.get(schema.device)
            empty = torch.empty if stream is None else stream.empty
            shape = (self.block_steps, *schema.shape)
            dtypes = {array_path(group, name): dtype for name, dtype in schema.dtypes.items()}
            for path, native in dtypes.items():
                self._tensors[path] = empty(shape, dtype=getattr(torch, native))
            for name in schema.numbers:
                values = loss if name == "loss" else empty(shape[:1], dtype=torch.float64)
                self._scalars[array_path(group, name)] = values
            if group in filled_in:
                self._filled_in |= dtypes.keys() - {array_path(group, "grad")}
            if group in rows:
                self._rows |= dict.fromkeys(dtypes, rows[group])
            if stream is not None:
                paths = (array_path(group, name) for name in schema.numbers)
                self._stream_of |= dict.fromkeys((*dtypes, *paths), stream)
        self._loss = loss.numpy()
        self.scalars = {path: values.numpy() for path, values in self._scalars.items()}
        self._counts = {group: self.scalars[array_path(group, COUNT)] for group in schemas}
        self.start(0)

    @property
    def is_full(self) -> bool:
        """Whether every row is complete."""
        return self.n_rows == self.block_steps

    def start(self, first_row: int) -> None:
        """Forget all rows and begin at `first_row`."""
        self.first_row, self.n_rows = first_row, 0
        self.is_whole[:] = True
        self.is_late[:] = False
        for rows in (*self.filled.values(), *self.missing.values()):
            rows[:] = False
        for values in self.scalars.values():
            values.fill(np.nan)

    def declare(self, path: str, logged: LoggedArray) -> None:
        """Have room for what is logged at each step under a name."""
        self.scalars[path] = logged.missing(self.block_steps)

    def load(self, readers: Sequence[StoreReader], n_rows: int) -> StepCounts:
        """Begin with the rows of the store's last block; return the counts at the row before."""
        self.start(n_rows - n_rows % self.block_steps)
        first, self.n_rows = self.first_row, n_rows - self.first_row
        steps, bits, counts = readers[0].read_steps(), self.bits(), {}
        self.steps[: self.n_rows] = steps[first:n_rows]
        for reader in readers:
            scalars = reader.read_numbers()
            counts[reader.group] = scalars[COUNT]
            for name, values in scalars.items():
                self.scalars[array_path(reader.group, name)][: self.n_rows] = values[first:n_rows]
            for name, values in reader.read_logged().items():
                self.scalars[array_path(reader.group, name)][: self.n_rows] = values[first:n_rows]
            for name in reader.schema.dtypes if self.n_rows else ():
                rows = reader.read(name, (first, n_rows))
                bits[array_path(reader.group, name)][: self.n_rows] = rows
            history = reader.read_history()
            for of, marked in ((self.filled, history.filled), (self.missing, history.missing)):
                for start, stop in marked:
                    of[reader.group][max(start - first, 0) : max(stop - first, 0)] = True
        return StepCounts.at_row(first - 1, steps, counts)

    def take_early(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Copy variables of the next row before the step overwrites them: `append` leaves them out.

        What was taken for a step that failed is forgotten.
        """
        for stream in self._streams.values():
            stream.start()
        for name, tensor in tensors.items():
            self._take_row(name, tensor, self.n_rows)
        self._early = {*tensors}

    def append(
        self,
        tensors: Mapping[str, Tensor | None],
        scalars: Mapping[str, float | Tensor],
        *,
        step: int,
        whole: bool = True,
    ) -> None:
        """Copy the row of a step in, which counts only when all of it is there.

        None is missing, as is a scalar that is not given. If not `whole`, what is filled in later
        is left out. OptimizerError if shape or dtype changed.
        """
        if not self._early:
            for stream in self._streams.values():
                stream.start()
        left_out = set() if whole else self._filled_in
        for name in self._tensors.keys() - left_out:
            if name not in self._early or tensors[name] is None:
                self._take_row(name, tensors[name], self.n_rows)
        self._early = set()
        self.is_whole[self.n_rows] = whole or not left_out
        for name, value in scalars.items():
            if isinstance(value, Tensor):
                self._take(name, self._scalars[name][self.n_rows], value)
            else:
                self.scalars[name][self.n_rows] = value
        self._arrived = [stream.send() for stream in self._streams.values()]
        self.steps[self.n_rows] = step
        self.n_rows += 1

    def complete(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Copy into the last row what was left out of it, if nothing changed since its step."""
        last = self.n_rows - 1
        if last >= 0 and not self.is_whole[last]:
            for name in self._filled_in:
                self._take_row(name, tensors[name], last)
            self.is_whole[last] = self.is_late[last] = True

    def marked_rows(self, n_rows: int) -> dict[str, dict[str, list[tuple[int, int]]]]:
        """Return which of the first rows are `filled` and `missing`, by group.

        They are `(first, stop)` of the store.
        """
        found: dict[str, dict[str, list[tuple[int, int]]]] = {"filled": {}, "missing": {}}
        for name, marks in (("filled", self.filled), ("missing", self.missing)):
            for group, is_marked in marks.items():
                edges = np.flatnonzero(np.diff(is_marked[:n_rows], prepend=False, append=False))
                rows = (self.first_row + edges).tolist()
                if rows:
                    found[name][group] = [*zip(rows[::2], rows[1::2], strict=True)]
        return found

    def set_last_loss(self, loss: float) -> None:
        """Note the loss of the last row."""
        self._loss[self.n_rows - 1] = loss

    def set_last_logged(self, logged: Mapping[str, np.ndarray]) -> None:
        """Note what was logged of the last row, by path in the store."""
        for path, values in logged.items():
            self.scalars[path][self.n_rows - 1] = values

    def _take_row(self, name: str, tensor: Tensor | None, index: int) -> None:
        row, indices = self._tensors[name][index], self._rows.get(name)
        if tensor is None:
            row.fill_(torch.nan)
            return
        shape = tensor.shape if indices is None else (len(indices), *tensor.shape[1:])
        if shape != row.shape or tensor.dtype != row.dtype:
            raise OptimizerError(
                f"{name} became {dtype_name(tensor)} {tuple(tensor.shape)} during the run, but "
                f"{dtype_name(row)} {tuple(row.shape)} was declared; start a new recording"
            )
        self._take(name, row, tensor, indices)

    def _take(self, path: str, row: Tensor, tensor: Tensor, indices: Tensor | None = None) -> None:
        if path in self._stream_of:
            self._stream_of[path].stage(path, row, tensor, indices)
        else:
            _copy(row, tensor, indices)

    def settle(self, before: StepCounts) -> int:
        """Wait until all rows are there, and take back the gradients that no step consumed.

        Given the counts at the row before, return how many rows come before a missed step.
        """
        for arrived in self._arrived:
            arrived()
        n_sound, steps = self.n_rows, self.steps[: self.n_rows]
        for group, counts in self._counts.items():
            at_before = (float(before.counts[group]), before.step)
            skipped, missed = judge_rows(counts[: self.n_rows], steps, before=at_before)
            if (grad := array_path(group, "grad")) in self._tensors:
                self._tensors[grad][skipped] = torch.nan
            n_sound = min([n_sound, *missed.tolist()])
        self.derive(n_sound)
        return n_sound

    def derive(self, n_rows: int) -> None:
        """Note what torch derives from the scalars of the first rows, where that is missing."""
        for group, schema in self._schemas.items():
            names = {name: array_path(group, name) for name in schema.numbers}
            derive(schema, {name: self.scalars[path][:n_rows] for name, path in names.items()})

    def counts(self, n_rows: int, before: StepCounts) -> StepCounts:
        """Return the optimizer's counts after some rows of the block: those `before` after none."""
        return StepCounts.at_row(n_rows - 1, self.steps, self._counts) if n_rows else before

    def bits(self) -> dict[str, np.ndarray]:
        """Return each variable as stored: views, shape `(block_steps, token, dim)`."""
        return {name: as_rows(tensor_bits(rows)) for name, rows in self._tensors.items()}


def _marks(groups: Iterable[str], n_rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield two marks for each row, by group, not set."""
    for _ in range(2):
        yield {group: np.zeros(n_rows, bool) for group in groups}


def _copy(row: Tensor, tensor: Tensor, indices: Tensor | None) -> None:
    """Copy a tensor, or some rows of it, from any device; on the CPU in one thread.

    Those of torch would wait for each other whenever the writer has one of their cores.
    """
    if not tensor.is_cpu:
        row.copy_(tensor if indices is None else tensor.index_select(0, indices))
    elif indices is None:
        np.copyto(tensor_bits(row), tensor_bits(tensor))
    else:
        # Clipped, which nothing is, so that NumPy writes into the row itself.
        np.take(tensor_bits(tensor), indices.numpy(), axis=0, out=tensor_bits(row), mode="clip")
