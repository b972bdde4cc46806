"""The notebook's file: the safetensors container, its names and scalars, what a store keeps.

`safetensors` reads the header (0.1 ms for 20 GB: the file is mapped, and only its header is
touched). The tensors are read by their offsets: `safetensors` gives NumPy no bfloat16, and pages of
a mapped file would count as the process's own memory. The header is written here, because
`safetensors` writes only tensors that are in memory.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from thimble_zarr.bits import decode
from thimble_zarr.errors import ConfigError, DamagedStoreError, NotAStoreError
from thimble_zarr.format.schema import NOTEBOOK_FILE, Json

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


def read_bits(file: Path, tensor: Tensor) -> np.ndarray:
    """Read a small tensor whole, as its bits."""
    bits = np.empty(tensor.shape, DTYPES[tensor.dtype])
    with file.open("rb", buffering=0) as stream:
        stream.seek(tensor.offset)
        _read_into(stream, bits)
    return bits


def read_rows(
    file: Path, tensor: Tensor, rows: Iterable[int], columns: tuple[int, int] | None = None
) -> Iterator[np.ndarray]:
    """Yield the bits of rows, from the first column to before the last, in one array."""
    first, end = columns or (0, tensor.shape[1])
    bits = np.empty((end - first, *tensor.shape[2:]), DTYPES[tensor.dtype])
    row_bytes = tensor.n_bytes // tensor.shape[0]
    with file.open("rb", buffering=0) as stream:
        for row in rows:
            stream.seek(tensor.offset + row * row_bytes + first * (row_bytes // tensor.shape[1]))
            _read_into(stream, bits)
            yield bits


def _read_into(stream: BinaryIO, target: np.ndarray) -> None:
    view = target.reshape(-1).view(np.uint8).data
    while view:
        n_read = stream.readinto(view)  # type: ignore[attr-defined]  # typeshed leaves it out
        if not n_read:
            raise DamagedStoreError("it was cut off after it was opened; copy it again")
        view = view[n_read:]


FILE_NAMES = {"W": "W", "grad": "grad_W", "exp_avg": "momentum_W", "exp_avg_sq": "variance_W"}
"""What the notebook calls our variables."""

STATES = ("exp_avg", "exp_avg_sq")
"""The variables that the notebook kept as float32 whatever they were."""

LOSSES = "losses"

HYPERPARAMETERS: Mapping[str, str] = {
    "learning_rate": "learning_rate",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}
"""What the notebook calls our per-step scalars. It has one value for the whole run."""

CONFIG: Mapping[str, str] = {
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

FLOAT_SCALARS = (*HYPERPARAMETERS.values(), "init_scale")
"""Those of the notebook's scalars that are float32; the others are int64."""

NATIVE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""The dtypes a recording can have: as safetensors names them, and as torch does."""

_MAX_KEPT_BYTES = 2**16
_N_NAMED = 20


@dataclass(frozen=True)
class NotebookLayout:
    """Where everything lies in a notebook's file; as JSON it is an attribute of the store.

    `kept` has the bytes of what a store has no place for: scalars, and whatever else is small.
    `metadata` is what the file's writer noted.
    """

    tensors: Mapping[str, Tensor]
    kept: Mapping[str, bytes]
    metadata: Mapping[str, str] | None = None

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read everything but the rows, as far as it is small.

        Raises as `read_header` does, and NotAStoreError if the layout is not the notebook's.
        """
        tensors, metadata = read_header(file)
        _check_layout(tensors)
        kept: dict[str, bytes] = {}
        n_free, sizes = _MAX_KEPT_BYTES, {name: tensors[name].n_bytes for name in _beside(tensors)}
        # Settings first: whatever else there is, they are kept.
        for name in sorted(sizes, key=lambda name: (name not in CONFIG, sizes[name])):
            if sizes[name] <= n_free:
                kept[name] = read_bits(file, tensors[name]).tobytes()
                n_free -= sizes[name]
        layout = cls(tensors, kept, metadata)
        layout.hyperparameters()  # are finite
        return layout

    @classmethod
    def from_attribute(cls, attribute: Any) -> Self:
        """Read what `to_attribute` wrote; raise DamagedStoreError if it is something else."""
        try:
            entries = attribute["tensors"].items()
            tensors = {n: Tensor(entry["dtype"], tuple(entry["shape"])) for n, entry in entries}
            kept = {n: bytes.fromhex(entry["hex"]) for n, entry in entries if "hex" in entry}
            _check_layout(tensors)
            broken = [name for name in kept if len(kept[name]) != tensors[name].n_bytes]
            if broken:
                raise ValueError(f"{', '.join(broken)} not whole")
            return cls(tensors, kept, attribute["metadata"])
        except (LookupError, TypeError, ValueError, AttributeError, NotAStoreError) as error:
            raise DamagedStoreError(
                f"the attribute {NOTEBOOK_FILE!r} is not what an import writes: {error}"
            ) from error

    def to_attribute(self) -> Json:
        """Return it as JSON."""
        tensors: dict[str, dict[str, Json]] = {
            name: {"dtype": of.dtype, "shape": of.shape} for name, of in self.tensors.items()
        }
        for name, content in self.kept.items():
            tensors[name]["hex"] = content.hex()
        return {"tensors": tensors, "metadata": self.metadata}

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtypes of our variables, as torch names them."""
        return {ours: NATIVE[self.tensors[name].dtype] for ours, name in FILE_NAMES.items()}

    def check_all_kept(self) -> None:
        """Raise ConfigError if the file has more than a store can keep."""
        lost = [name for name in _beside(self.tensors) if name not in self.kept]
        if lost:
            raise ConfigError(
                f"the file has {', '.join(lost)} beside the notebook's tensors, and a store has "
                f"room for {_MAX_KEPT_BYTES:,} bytes of others; save the file without"
            )

    def numbers(self) -> dict[str, float]:
        """Return the scalars that are settings of a run, as the run had them.

        The notebook rounded 0.001 to float32. The optimizer computed with the double 0.001, and
        only from that number do its steps follow exactly: it is the shortest decimal that rounds to
        what the file has.
        """
        numbers: dict[str, float] = {}
        for name in CONFIG:
            tensor = self.tensors.get(name)
            if tensor is None or name not in self.kept or tensor.shape != ():
                continue
            value = np.frombuffer(self.kept[name], DTYPES[tensor.dtype])[0]
            if tensor.dtype == "BF16":
                numbers[name] = float(decode(value, "bfloat16"))
            elif tensor.dtype in ("F16", "F32"):
                numbers[name] = float(str(value))
            elif tensor.dtype in ("F64", "I64", "I32"):
                numbers[name] = value.item()
        return numbers

    def hyperparameters(self) -> dict[str, float]:
        """Return the per-step scalars that the file has one value of."""
        numbers = self.numbers()
        for name in HYPERPARAMETERS.values():
            if not math.isfinite(numbers[name]):
                raise NotAStoreError(f"{name} is {numbers[name]}, expected a finite number")
        return {ours: numbers[name] for ours, name in HYPERPARAMETERS.items()}

    def config(self) -> dict[str, Json]:
        """Return the settings of the run under our own names."""
        numbers = self.numbers().items()
        return {CONFIG[name]: number for name, number in numbers if math.isfinite(number)}


def _beside(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors that do not have a row a step."""
    return [name for name in tensors if name not in (*FILE_NAMES.values(), LOSSES)]


def _check_layout(tensors: Mapping[str, Tensor]) -> None:
    big = tuple(FILE_NAMES.values())
    needed = (*big, LOSSES, *HYPERPARAMETERS.values())
    missing = [name for name in needed if name not in tensors]
    if missing:
        found = ", ".join([*tensors][:_N_NAMED]) + (", ..." if len(tensors) > _N_NAMED else "")
        raise NotAStoreError(
            f"it is not the notebook's file: it has no {', '.join(missing)}, only "
            f"{found or 'nothing'}; pass the file that the notebook saved"
        )
    shape = tensors["W"].shape
    if len(shape) != 3 or 0 in shape:
        raise NotAStoreError(f"W has shape {shape}, expected (step, token, dim)")
    expected = dict.fromkeys(big, shape) | {LOSSES: shape[:1]}
    for name, wanted in (expected | dict.fromkeys(HYPERPARAMETERS.values(), ())).items():
        dtype, found_shape = tensors[name].dtype, tensors[name].shape
        if found_shape != wanted:
            raise NotAStoreError(f"{name} has shape {found_shape}, expected {wanted} beside W")
        if dtype not in NATIVE:
            raise NotAStoreError(f"{name} is {dtype}, expected one of {', '.join(NATIVE)}")
