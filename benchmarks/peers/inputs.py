"""What every peer is given: a recorded run, in the peer's own files, and the tasks."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

TABLES = ("formula, dead", "formula, all")
EXACT = "exact, all"
BOTH = "both, all"
SMALL = ("history", "residual", "row")
TITLES = {
    TABLES[0]: "formula check of the dead tokens",
    TABLES[1]: "formula check of all tokens",
    EXACT: "exact check of all tokens",
    BOTH: "both checks of all tokens in one pass",
    SMALL[0]: "history of one token, four variables",
    SMALL[1]: "`adam_residual` of 100 random tokens, every step",
    SMALL[2]: "one step of the four variables",
}

TASKS = tuple(task for task in TITLES if task != BOTH)
"""What every peer solves; both checks at once are ours alone."""

VARIABLES = ("W", "grad", "exp_avg", "exp_avg_sq")
N_RANDOM = 100


@dataclass(frozen=True)
class Inputs:
    """The files of the peers, and what is known of the run without reading its arrays.

    Attributes
    ----------
    directory
        Where the files of the peers lie (`prepare` makes them).
    store
        The recorded run.
    """

    directory: Path
    store: Path

    @cached_property
    def known(self) -> dict[str, np.ndarray]:
        """Per-step scalars, which tokens are dead, the shape, and which program torch ran."""
        with np.load(self.about_file) as file:
            return dict(file)

    @property
    def about_file(self) -> Path:
        """Where `known` is kept."""
        return self.directory / "run.npz"

    @property
    def notebook_file(self) -> Path:
        """What the first notebook would have saved."""
        return self.directory / "notebook.safetensors"

    @property
    def mask_file(self) -> Path:
        """The second notebook's mask."""
        return self.directory / "mask.safetensors"

    @property
    def hdf5_file(self) -> Path:
        """All four variables."""
        return self.directory / "run.h5"

    def raw_file(self, name: str) -> Path:
        """Return the file of a variable's bits, uint16, `(step, token, dim)`."""
        return self.directory / f"{name}.u16"

    def files(self, peer: str) -> list[Path]:
        """Return what a peer reads."""
        return {
            "notebook": [self.notebook_file],
            "memmap": [self.raw_file(name) for name in VARIABLES],
            "h5py": [self.hdf5_file],
        }.get(peer, [file for file in sorted(self.store.rglob("*")) if file.is_file()])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, tokens, dims."""
        n_rows, n_tokens, n_dims = self.known["shape"].tolist()
        return n_rows, n_tokens, n_dims

    @property
    def dead(self) -> np.ndarray:
        """Ids of the dead tokens."""
        return np.flatnonzero(self.known["dead"])

    @property
    def all_tokens(self) -> np.ndarray:
        """Every id."""
        return np.arange(self.shape[1])

    @property
    def random(self) -> np.ndarray:
        """Ids of random tokens, always the same."""
        ids = np.random.default_rng(0).permutation(self.shape[1])
        return np.sort(ids[:N_RANDOM])

    @property
    def token(self) -> int:
        """The token whose history is asked for."""
        return int(self.random[0])

    @property
    def row(self) -> int:
        """The row that is asked for whole."""
        return self.shape[0] // 2

    def formula_scalars(self) -> dict[str, np.ndarray]:
        """Return what the formula needs of each row, float32: `scale * m / (sqrt(v) + eps)`."""
        known = self.known
        count = np.maximum(known["optimizer_step"], 1)
        correction = np.sqrt(1 - known["beta2"] ** count)
        scalars = {
            "scale": -known["learning_rate"] * correction / (1 - known["beta1"] ** count),
            "eps": known["eps"] * correction,
            "decay": -known["learning_rate"] * known["weight_decay"],
        }
        return {name: values.astype(np.float32) for name, values in scalars.items()}


def columns(sums: np.ndarray) -> np.ndarray:
    """Return the table, a column each as in the notebook, of the sums of squares of each step.

    Of predicted and observed change and of their difference, and the sum of the products.
    """
    norms = np.sqrt(sums[:, :3])
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = sums[:, 3] / (norms[:, 0] * norms[:, 1])
        return np.column_stack([norms, cosine, norms[:, 0] / norms[:, 1]])
