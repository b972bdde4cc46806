"""The safetensors container: named tensors end to end, and settings as tensors without dimensions.

`safetensors` reads the header (0.1 ms for 20 GB: the file is mapped, and only its header is
touched). The tensors are read by their offsets: `safetensors` gives NumPy no bfloat16, and pages of
a mapped file would count as the process's own memory. The header is written here, because
`safetensors` writes only tensors that are in memory.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from thimble_zarr.errors import DamagedStoreError, NotAStoreError
from thimble_zarr.format.documents import Json, parsed
from thimble_zarr.sources.containers.array import FileContents, RawArray, number, whole

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(numpy)
    for name, numpy in {
        "U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4",
        "BF16": "<u2", "F16": "<f2", "U16": "<u2", "I16": "<i2", "F8_E4M3": "u1", "F8_E5M2": "u1",
        "I8": "i1", "U8": "u1", "BOOL": "?",
    }.items()
}  # fmt: skip
"""What holds the bits of each dtype, in the order in which safetensors writes tensors: by dtype,
the largest first, and then by name."""

NATIVE = {
    "BF16": "bfloat16",
    "U16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
"""The dtypes a recording can have: as safetensors names them, and as torch does. Where NumPy had
to hold bfloat16, its bits are 16-bit integers."""

_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: dtype as safetensors names it, and where in the file it begins."""

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def n_bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(file: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Return the tensors of a file in the order in which they lie, and its writer's notes.

    Raises NotAStoreError if it is not a safetensors file, DamagedStoreError if it is one, but was
    cut off or has too many bytes, and OSError if it cannot be read.
    """
    n_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        text = stream.read(1)
        if text != b"{" or not 2 <= length <= _MAX_HEADER_BYTES:
            raise NotAStoreError("it is not a safetensors file")
        start = _LENGTH_BYTES + length
        if start > n_bytes:
            raise _cut_off(n_bytes, start)
        try:
            with safe_open(file, "np") as opened:
                names, metadata = opened.offset_keys(), opened.metadata()
                slices = {name: opened.get_slice(name) for name in names}
                found = [(name, at.get_dtype(), at.get_shape()) for name, at in slices.items()]
        except SafetensorError as error:
            if "ncomplete" not in str(error):  # the header is sound, but not of as many bytes
                raise NotAStoreError(f"it is not a sound safetensors file: {error}") from error
            content = json.loads(text + stream.read(length - 1))
            content.pop("__metadata__", None)
            ends = (entry["data_offsets"][1] for entry in content.values())
            raise _cut_off(n_bytes, start + max(ends, default=0)) from error
    tensors: dict[str, Tensor] = {}
    for name, dtype, shape in found:
        if dtype not in DTYPES:
            raise NotAStoreError(f"its tensor {name!r} has the unknown dtype {dtype!r}")
        tensors[name] = Tensor(dtype, tuple(shape), start)
        start += tensors[name].n_bytes
    # Empty tensors share their offset, and come in any order.
    order = sorted(tensors, key=lambda name: (tensors[name].offset, tensors[name].n_bytes, name))
    return {name: tensors[name] for name in order}, metadata


def _cut_off(n_bytes: int, n_expected: int) -> DamagedStoreError:
    return DamagedStoreError(
        f"it has {n_bytes:,} bytes, and its header promises {n_expected:,}; copy it again, or "
        "save it again"
    )


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """Return length and JSON as safetensors writes them, for tensors end to end."""
    content: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        ends = offset, offset + tensor.n_bytes
        content[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": ends}
        offset += tensor.n_bytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_safetensors(path: Path) -> FileContents:
    """Return what a safetensors file has, and the settings in `metadata.json` beside it.

    Raises as `read_header` does.
    """
    tensors, _ = read_header(path)
    arrays = {
        name: RawArray.at(
            path, tensor.offset, tensor.shape, DTYPES[tensor.dtype], NATIVE.get(tensor.dtype)
        )
        for name, tensor in tensors.items()
    }
    settings = _beside(path)
    for name, array in arrays.items():
        if array.shape == () and not tensors[name].dtype.startswith("F8"):
            settings[name] = number(whole(array)[()], array.native)
    return FileContents(
        path, "safetensors", {name: of for name, of in arrays.items() if of.shape}, settings
    )


def _beside(path: Path) -> dict[str, Json]:
    """Return the settings that lie in a JSON file beside a file; those of groups, too, by name."""
    for name in (f"{path.stem}_metadata.json", f"{path.stem}.json", "metadata.json"):
        file = path.with_name(name)
        if not file.is_file():
            continue
        try:
            content = parsed(file.read_bytes())
        except ValueError as error:
            raise NotAStoreError(f"{file.name} beside it is not JSON: {error}") from error
        return _flat(content) if isinstance(content, dict) else {}
    return {}


def _flat(content: Mapping[str, Json]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for name, value in content.items():
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found
