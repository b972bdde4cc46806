"""The first notebook's file as an attribute of a store: all it takes to write the file again.

Such a file has everything: `W`, `grad_W`, `momentum_W` and `variance_W` with a row for the initial
state and one for each step, the losses, and hyper-parameters as tensors without dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from thimble_zarr.errors import ConfigError, DamagedStoreError, NotAStoreError
from thimble_zarr.format.schema import NOTEBOOK_FILE, Json
from thimble_zarr.sources.containers.safetensors import NATIVE, Tensor, read_header

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

_MAX_KEPT_BYTES = 2**17
"""Room for masks and ids of 10,000 tokens."""


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
                kept[name] = _content(file, tensors[name])
                n_free -= sizes[name]
        return cls(tensors, kept, metadata)

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

    def check_all_kept(self) -> None:
        """Raise ConfigError if the file has more than a store can keep."""
        lost = [name for name in _beside(self.tensors) if name not in self.kept]
        if lost:
            raise ConfigError(
                f"the file has {', '.join(lost)} beside the notebook's tensors, and a store has "
                f"room for {_MAX_KEPT_BYTES:,} bytes of others; save the file without"
            )


def _beside(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors that do not have a row a step."""
    return [name for name in tensors if name not in (*FILE_NAMES.values(), LOSSES)]


def _content(file: Path, tensor: Tensor) -> bytes:
    """Return the bytes of a small tensor."""
    with file.open("rb") as stream:
        stream.seek(tensor.offset)
        return stream.read(tensor.n_bytes)


def is_notebook(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors are those of the first notebook: all of them, and as it has them."""
    big = tuple(FILE_NAMES.values())
    if not {*big, LOSSES, *HYPERPARAMETERS.values()} <= {*tensors}:
        return False
    shape = tensors["W"].shape
    expected = dict.fromkeys(big, shape) | {LOSSES: shape[:1]}
    expected |= dict.fromkeys(HYPERPARAMETERS.values(), ())
    return len(shape) == 3 and all(
        tensors[name].shape == wanted and tensors[name].dtype in NATIVE
        for name, wanted in expected.items()
    )


def _check_layout(tensors: Mapping[str, Tensor]) -> None:
    if not is_notebook(tensors):
        raise NotAStoreError("it is not the first notebook's file")
