"""Checkpoints of a model at one step: safetensors files, or PyTorch's distributed checkpoints."""

import io
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from thimble_zarr.bits import NATIVE_DTYPES
from thimble_zarr.errors import DamagedStoreError, NotAStoreError, StoreError
from thimble_zarr.sources.containers.array import FileArray, whole
from thimble_zarr.sources.containers.safetensors import read_safetensors

METADATA = ".metadata"
"""The file of a distributed checkpoint that says what is in it."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor; the dtype as torch names it, None of what has no fractions."""

    shape: tuple[int, ...]
    native: str | None


class Checkpoint(Protocol):
    """What is in a checkpoint: tensors by name."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors in it."""

    def read(self, name: str) -> np.ndarray:
        """Read a tensor whole: its bits."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors file, a directory of such files, or a distributed checkpoint.

    Raises NotAStoreError if it is none, DamagedStoreError if it was cut off, and OSError if it
    cannot be read.
    """
    if not path.is_dir():
        if not path.exists():
            raise NotAStoreError("there is nothing; check the path")
        return SafetensorsCheckpoint(path, read_safetensors(path).arrays)
    if (path / METADATA).is_file():
        return _distributed(path)
    arrays: dict[str, FileArray] = {}
    for file in sorted(path.glob("*.safetensors")):
        found = read_safetensors(file).arrays
        if twice := arrays.keys() & found.keys():
            raise NotAStoreError(
                f"{min(twice)} is in {file.name} and in another file of it; name one of the files"
            )
        arrays |= found
    if not arrays:
        raise NotAStoreError(f"it is a directory with neither {METADATA} nor safetensors files")
    return SafetensorsCheckpoint(path, arrays)


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """One safetensors file, or several that have the tensors of a model between them."""

    path: Path
    arrays: Mapping[str, FileArray]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors in it."""
        return {name: TensorInfo(of.shape, of.native) for name, of in self.arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """Read a tensor whole."""
        return whole(self.arrays[name])


@dataclass(frozen=True)
class DistributedCheckpoint:
    """A directory that `torch.distributed.checkpoint` saved, by whatever number of processes."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """Read a tensor whole, from all files that have a part of it."""
        import torch
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        of = self.tensors[name]
        tensor = torch.empty(of.shape, dtype=getattr(torch, of.native or "float32"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is a single process
            try:
                load({name: tensor}, storage_reader=FileSystemReader(self.path))
            except CheckpointException as error:
                raise DamagedStoreError(f"torch cannot read {name}: {error}") from error
        stored = tensor.view(torch.uint16) if of.native == "bfloat16" else tensor
        bits: np.ndarray = stored.numpy()
        return bits


_ALLOWED = re.compile(
    r"torch\.(Size|bfloat16|(float|u?int)\d+|bool)"
    r"|torch\.distributed\.checkpoint\.metadata\.(Metadata(Index)?|(Tensor|Bytes)StorageMetadata"
    r"|TensorProperties|ChunkStorageMetadata|StorageMeta|_MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.filesystem\._Storage(Info|Prefix)"
    r"|torch\.serialization\._get_layout"
    r"|pathlib(\._local)?\.\w*Path|collections\.OrderedDict"  # Python 3.13 has them in _local
)
"""What the index of a distributed checkpoint is made of: classes, by name. A module of torch has
more in it, such as `dataclass`, which compiles what it is given as the name of a field."""


class _IndexOnly(pickle.Unpickler):
    """Unpickles the index of a checkpoint, and nothing that could run other code."""

    def find_class(self, module: str, name: str) -> Any:
        if not _ALLOWED.fullmatch(f"{module}.{name}"):
            raise NotAStoreError(
                f"its {METADATA} asks for {module}.{name}, which no checkpoint needs; it was not "
                "read"
            )
        return super().find_class(module, name)


def _distributed(path: Path) -> DistributedCheckpoint:
    """Return a distributed checkpoint.

    Its index is a pickle, which could run any code. torch reads it only after it was looked
    through here.
    """
    content = (path / METADATA).read_bytes()
    try:
        index = _IndexOnly(io.BytesIO(content)).load()
        tensors = {
            name: of for name, of in index.state_dict_metadata.items() if hasattr(of, "properties")
        }
        for name, of in tensors.items():
            # torch would leave what no file has as it found the memory.
            if sum(prod(chunk.sizes) for chunk in of.chunks) < prod(of.size):
                raise DamagedStoreError(f"its {METADATA} does not say where all of {name} lies")
        known = {
            name: TensorInfo(tuple(of.size), _native(of.properties.dtype))
            for name, of in tensors.items()
        }
    except StoreError:
        raise
    except Exception as error:  # whatever a broken pickle raises
        raise DamagedStoreError(f"its {METADATA} cannot be read: {error!r}") from error
    return DistributedCheckpoint(path, known)


def _native(dtype: object) -> str | None:
    name = str(dtype).removeprefix("torch.")
    return name if name in NATIVE_DTYPES else None
