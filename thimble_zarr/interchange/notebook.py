"""The file of the original notebook: one safetensors file with everything in it.

`W` and `grad_W` are bfloat16 and the moments float32, whatever the run's dtype was; the gradient of
the initial state is zero. The file is written row by row in bounded memory.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from thimble_zarr.errors import ConfigError
from thimble_zarr.format.bits import decode
from thimble_zarr.format.layout import split_range
from thimble_zarr.format.store import StoreReader

_MOMENTS = {"momentum_W": "exp_avg", "variance_W": "exp_avg_sq"}
_WEIGHTS = {"W": "W", "grad_W": "grad"}

_CONFIG = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_dim",
    "n_layers": "layers",
    "n_heads": "heads",
    "num_steps": "steps",
    "batch_size": "batch_size",
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "init_scale": "init_scale",
    "seed": "seed",
}
"""The notebook's scalars, and the settings of a run they are."""


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    parts: Iterator[np.ndarray]

    @property
    def n_bytes(self) -> int:
        n_bytes = self.itemsize
        for length in self.shape:
            n_bytes *= length
        return n_bytes


def export_notebook(reader: StoreReader, file: Path) -> None:
    """Write a recorded bfloat16 run as the original notebook would have saved it.

    Parameters
    ----------
    reader
        A store of a bfloat16 run, such as `thimble-zarr train` makes.
    file
        Safetensors file to write.

    Raises
    ------
    ConfigError
        If the run is not bfloat16, which the notebook's file cannot hold without loss.
    OSError
        If the file cannot be written.
    """
    if set(reader.schema.dtypes.values()) != {"bfloat16"}:
        raise ConfigError(
            f"{reader.path} holds {reader.schema.dtypes['W']}, and the notebook's file bfloat16 "
            "weights only; a copy would lose precision"
        )
    tensors = _tensors(reader)
    with file.open("wb") as stream:
        _write_header(stream, tensors)
        for tensor in tensors.values():
            for part in tensor.parts:
                stream.write(np.ascontiguousarray(part).data)


def _tensors(reader: StoreReader) -> dict[str, _Tensor]:
    schema = reader.schema
    shape = (reader.n_rows, schema.n_tokens, schema.n_dims)
    tensors = {
        name: _Tensor("F32", shape, 4, _moments(reader, variable))
        for name, variable in _MOMENTS.items()
    }
    losses = reader.read_scalars()["loss"].astype(np.float32)
    tensors["losses"] = _Tensor("F32", losses.shape, 4, iter([losses]))
    for name, value in _scalars(reader).items():
        tensors[name] = _Tensor(
            "I64" if value.dtype.kind == "i" else "F32", (), value.itemsize, iter([value])
        )
    for name, variable in _WEIGHTS.items():
        tensors[name] = _Tensor("BF16", shape, 2, _weights(reader, variable))
    return tensors


def _moments(reader: StoreReader, variable: str) -> Iterator[np.ndarray]:
    for rows in split_range(0, reader.n_rows, reader.schema.layout.block_steps):
        yield decode(reader.read(variable, rows), "bfloat16")


def _weights(reader: StoreReader, variable: str) -> Iterator[np.ndarray]:
    for rows in split_range(0, reader.n_rows, reader.schema.layout.block_steps):
        bits = reader.read(variable, rows)
        if variable == "grad" and rows[0] == 0:
            bits[0] = 0
        yield bits


def _scalars(reader: StoreReader) -> dict[str, np.ndarray]:
    config, labels = reader.schema.attrs.get("config"), reader.read_labels()
    known = config if isinstance(config, Mapping) else {}
    scalars = {name: known[key] for name, key in _CONFIG.items() if key in known}
    if labels.live is not None:
        n_live = int(labels.live.sum())
        scalars |= {"n_live": n_live, "n_dead": reader.schema.n_tokens - n_live}
    return {
        name: np.array(value, dtype=np.int64 if isinstance(value, int) else np.float32)
        for name, value in scalars.items()
    }


def _write_header(stream: BinaryIO, tensors: Mapping[str, _Tensor]) -> None:
    """Write length and JSON of the header, as the safetensors format defines them."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.n_bytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    stream.write(len(content).to_bytes(8, "little") + content)
