"""Record a synthetic loop with one peer in this process, and print what it took.

A bfloat16 embedding under torch's AdamW, started as the recorded run was, that consumes the first
gradients of the run in turn: no model is trained, the data are real. Then the loop sleeps until the
step has lasted `STEP_S`, where forward and backward would be.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.inputs import VARIABLES, Inputs
from benchmarks.peers.prepare import HDF5_OPTIONS, chunk_shape

N_GRADIENTS = 64
STEP_S = 0.015
BLOCK_STEPS, CHUNK_TOKENS = 16, 500
"""1 MB; for h5py its chunks are 2 MB."""

Row = Mapping[str, Tensor]


class Loop:
    """The optimizer, its one parameter and the gradients to come."""

    def __init__(self, inputs: Inputs, n_steps: int) -> None:
        self.n_steps = n_steps
        _, *shape = inputs.shape
        self.shape: tuple[int, int] = shape[0], shape[1]
        (weights,) = self._rows(inputs, "W", 0, 1)
        self.chunk = BLOCK_STEPS, min(CHUNK_TOKENS, shape[0]), shape[1]
        self._gradients = self._rows(inputs, "grad", 1, min(1 + N_GRADIENTS, inputs.shape[0]))
        self.parameter = torch.nn.Parameter(weights)
        self.optimizer = torch.optim.AdamW([self.parameter], lr=1e-3, foreach=False)

    def _rows(self, inputs: Inputs, name: str, start: int, stop: int) -> Tensor:
        n_elements = self.shape[0] * self.shape[1]
        first, count = 2 * start * n_elements, (stop - start) * n_elements
        bits = np.fromfile(inputs.raw_file(name), np.uint16, count, offset=first)
        return torch.from_numpy(bits.reshape(-1, *self.shape)).view(torch.bfloat16)

    def step(self, index: int) -> None:
        """Take a step."""
        self._gradient = self._gradients[index % len(self._gradients)]
        self.parameter.grad = self._gradient
        self.optimizer.step()

    def row(self) -> Row:
        """Return what is to be recorded, zeros before the first step."""
        state = self.optimizer.state[self.parameter]
        if not state:
            zeros = torch.zeros_like(self.parameter)
            return dict.fromkeys(VARIABLES, zeros) | {"W": self.parameter}
        moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        return {"W": self.parameter, "grad": self._gradient, **moments}


class Recording(Protocol):
    """Something that keeps rows."""

    def append(self, row: Row) -> None:
        """Keep a row; the loop changes its tensors afterwards."""

    def close(self) -> None:
        """Finish: everything is with the operating system."""


class Nothing:
    """The bare loop."""

    def __init__(self, path: Path, loop: Loop) -> None:
        pass

    def append(self, row: Row) -> None:
        """Keep nothing."""

    def close(self) -> None:
        """Do nothing."""


class Notebook:
    """Clones in lists, moments as float32, one safetensors file at the end."""

    def __init__(self, path: Path, loop: Loop) -> None:
        self._path = path
        self._rows: dict[str, list[Tensor]] = {name: [] for name in VARIABLES}

    def append(self, row: Row) -> None:
        """Clone."""
        for name in ("W", "grad"):
            self._rows[name].append(row[name].detach().clone())
        for name in ("exp_avg", "exp_avg_sq"):
            self._rows[name].append(row[name].float().clone())

    def close(self) -> None:
        """Stack and save."""
        from safetensors.torch import save_file

        save_file({name: torch.stack(rows) for name, rows in self._rows.items()}, self._path)


class Blocks:
    """Rows as bits in a block of steps, which is written when it is full."""

    def __init__(self, block_steps: int, loop: Loop) -> None:
        self._shape = (block_steps, *loop.shape)
        self._blocks = {name: np.empty(self._shape, np.uint16) for name in VARIABLES}
        self._first_row = self._n_rows = 0

    def append(self, row: Row) -> None:
        """Copy the bits."""
        for name, tensor in row.items():
            self._blocks[name][self._n_rows] = tensor.detach().view(torch.uint16).numpy()
        self._n_rows += 1
        if self._n_rows == self._shape[0]:
            self._write()

    def _write(self) -> None:
        if self._n_rows:
            rows = slice(self._first_row, self._first_row + self._n_rows)
            self.write(rows, {name: block[: self._n_rows] for name, block in self._blocks.items()})
            self._first_row, self._n_rows = rows.stop, 0

    def write(self, rows: slice, blocks: dict[str, np.ndarray]) -> None:
        """Put a block of each variable into the file."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left."""
        self._write()


class HDF5(Blocks):
    """h5py, a resizable dataset a variable."""

    def __init__(self, path: Path, loop: Loop) -> None:
        import h5py

        chunks = chunk_shape(*loop.shape)
        super().__init__(chunks[0], loop)
        self._file = h5py.File(path, "w")
        for name in VARIABLES:
            self._file.create_dataset(
                name,
                (0, *loop.shape),
                np.uint16,
                maxshape=(None, *loop.shape),
                chunks=chunks,
                **HDF5_OPTIONS,
            )

    def write(self, rows: slice, blocks: dict[str, np.ndarray]) -> None:
        """Grow the datasets."""
        for name, block in blocks.items():
            self._file[name].resize(rows.stop, axis=0)
            self._file[name][rows] = block

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._file.close()


class Zarr(Blocks):
    """zarr-python, an array a variable, grown by `append`."""

    def __init__(self, path: Path, loop: Loop) -> None:
        import zarr
        import zarr.codecs

        super().__init__(BLOCK_STEPS, loop)
        group = zarr.create_group(path)
        self._arrays = {
            name: group.create_array(
                name,
                shape=(0, *loop.shape),
                chunks=loop.chunk,
                shards=(BLOCK_STEPS, *loop.shape),
                dtype=np.uint16,
                compressors=zarr.codecs.BloscCodec(cname="lz4", clevel=9, shuffle="shuffle"),
            )
            for name in VARIABLES
        }

    def write(self, rows: slice, blocks: dict[str, np.ndarray]) -> None:
        """Append."""
        for name, block in blocks.items():
            self._arrays[name].append(block)


class TensorStore(Blocks):
    """TensorStore: a block is encoded and written while the next one is filled."""

    def __init__(self, path: Path, loop: Loop) -> None:
        import tensorstore

        super().__init__(BLOCK_STEPS, loop)
        blosc = {"cname": "lz4", "clevel": 9, "shuffle": "shuffle", "typesize": 2}
        inner = [{"name": "bytes"}, {"name": "blosc", "configuration": blosc}]
        sharding = {"chunk_shape": loop.chunk, "codecs": inner}
        grid = {"chunk_shape": [BLOCK_STEPS, *loop.shape]}
        metadata = {
            "shape": [loop.n_steps + 1, *loop.shape],
            "data_type": "uint16",
            "chunk_grid": {"name": "regular", "configuration": grid},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        self._arrays = {
            name: tensorstore.open(
                {
                    "driver": "zarr3",
                    "kvstore": {"driver": "file", "path": f"{path}/{name}"},
                    "metadata": metadata,
                },
                create=True,
            ).result()
            for name in VARIABLES
        }
        self._committing: list[tensorstore.Future[None]] = []

    def write(self, rows: slice, blocks: dict[str, np.ndarray]) -> None:
        """Start writing, once the block before is written; TensorStore keeps a copy."""
        import tensorstore

        self._wait()
        for name, block in blocks.items():
            whole = tensorstore.Transaction()  # else a shard is written again for every chunk
            self._arrays[name].with_transaction(whole)[rows].write(block).copy.result()
            self._committing.append(whole.commit_async())

    def _wait(self) -> None:
        while self._committing:
            self._committing.pop().result()

    def close(self) -> None:
        """Wait for the last block."""
        super().close()
        self._wait()


class Thimble:
    """Ours: the optimizer's hooks do it."""

    def __init__(self, path: Path, loop: Loop) -> None:
        from thimble_zarr import Recorder

        self._recorder = Recorder(
            path, loop.optimizer, parameter=loop.parameter, n_steps=loop.n_steps
        )

    def append(self, row: Row) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close the recorder."""
        self._recorder.close()


RECORDING: dict[str, Callable[[Path, Loop], Recording]] = {
    "nothing": Nothing,
    "notebook": Notebook,
    "h5py": HDF5,
    "zarr": Zarr,
    "tensorstore": TensorStore,
    "thimble-zarr": Thimble,
}


def run(peer: str, path: Path, inputs: Inputs, n_steps: int) -> dict[str, float]:
    """Train and record; return seconds and bytes."""
    loop = Loop(inputs, n_steps)
    busy_s, step_s = [], []
    start_s = time.perf_counter()
    recording = RECORDING[peer](path, loop)
    recording.append(loop.row())
    for step in range(n_steps):
        step_start_s = time.perf_counter()
        loop.step(step)
        recording.append(loop.row())
        busy_s.append(time.perf_counter() - step_start_s)
        time.sleep(max(0.0, STEP_S - busy_s[-1]))
        step_s.append(time.perf_counter() - step_start_s)
    steps_s = time.perf_counter() - start_s
    recording.close()
    return {
        "busy_median_s": statistics.median(busy_s),
        "busy_worst_s": max(busy_s),
        "step_median_s": statistics.median(step_s),
        "steps_s": steps_s,
        "total_s": time.perf_counter() - start_s,
        "disk_bytes": sum(
            file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()
        ),
    }


def main() -> None:
    """Take peer, path to record to, directory and store of the inputs, and steps."""
    peer, path, directory, store, n_steps = sys.argv[1:]
    taken = run(peer, Path(path), Inputs(Path(directory), Path(store)), int(n_steps))
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
