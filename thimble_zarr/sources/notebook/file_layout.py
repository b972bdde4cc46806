"""The layout of the notebook's file: its names, its scalars, and what a store keeps of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from thimble_zarr.bits import decode
from thimble_zarr.errors import ConfigError, DamagedStoreError, NotAStoreError
from thimble_zarr.format.schema import NOTEBOOK_FILE, Json
from thimble_zarr.sources.notebook.container import DTYPES, Tensor, read_bits, read_header

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
        n_free = _MAX_KEPT_BYTES
        sizes = {name: tensors[name].n_bytes for name in _beside(tensors)}
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
        tensors: dict[str, Json] = {}
        for name, tensor in self.tensors.items():
            kept = {"hex": self.kept[name].hex()} if name in self.kept else {}
            tensors[name] = {"dtype": tensor.dtype, "shape": tensor.shape, **kept}
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
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(big, shape)
    expected[LOSSES] = shape[:1]
    expected |= dict.fromkeys(HYPERPARAMETERS.values(), ())
    for name, wanted in expected.items():
        dtype, found_shape = tensors[name].dtype, tensors[name].shape
        if found_shape != wanted:
            raise NotAStoreError(f"{name} has shape {found_shape}, expected {wanted} beside W")
        if dtype not in NATIVE:
            raise NotAStoreError(f"{name} is {dtype}, expected one of {', '.join(NATIVE)}")
