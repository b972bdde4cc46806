"""A run whose tokens leave their regimes at steps that are known, because its weights are made."""

from functools import cache
from pathlib import Path

import numpy as np

import thimble_zarr
from tests.support.panels import summed
from tests.support.runs import N_DIMS, N_STEPS, N_TOKENS
from thimble_zarr.report.run import Run

ULP = 2.0**-7
"""That of bfloat16 from 1 to 2, where all weights are."""

EARLY = np.array([3, 0, 13, 5, 2, 0, 7, 1, 4, 2, 6])
MIDLIFE = np.array([5, 4, 13, 6, 2, 0, 13, 3, 9, 8, 7])
LATE = np.array([8, 4, 13, 11, 2, 0, 13, 12, 13, 9, 10])
"""The last step of each token in each regime. Token 5 never moves."""


def regime(token: int, step: int) -> str:
    """Return the regime that a token is in at a step."""
    for name, ends in (("early", EARLY), ("midlife", MIDLIFE), ("late", LATE)):
        if step <= ends[token]:
            return name
    return "frozen"


def moves() -> np.ndarray:
    """Return how many ULP the first dims move, shape `(step, token, dim)`, each then back."""
    found = np.zeros((N_STEPS + 1, N_TOKENS, N_DIMS))
    for token in range(N_TOKENS):
        for step in range(1, N_STEPS + 1):
            name = regime(token, step)
            is_last = step in (EARLY[token], MIDLIFE[token], LATE[token])
            if is_last or step % 3:  # a token may rest in any regime
                # L2 beyond sqrt(5); within it, but a dim by more than 1; each by 1 at most.
                size = {"early": [2, 2], "midlife": [2, 0], "late": [1, 1], "frozen": [0, 0]}[name]
                found[step, token, :2] = size
    return found


@cache
def resting(path: Path) -> Run:
    """Return the toy run with other weights."""
    sizes = moves()
    ahead = np.where(np.cumsum(sizes > 0, axis=0) % 2, 1, -1)  # forth and back
    W = np.float32(1.5) + ULP * np.cumsum(sizes * ahead, axis=0)
    assert W.min() > 1
    assert W.max() < 2
    ds = thimble_zarr.open_dataset(path).load()
    return summed(ds.assign(W=(ds.W.dims, W.astype(np.float32))))
