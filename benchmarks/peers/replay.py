"""The exact check by hand: torch's functional optimizer on whole rows, one after another."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from benchmarks.peers.inputs import Inputs


class Replay:
    """Takes every step again and counts elements that differ.

    Where the replay gave the recorded bits, its result is the row the next step starts from, and
    nothing is copied.
    """

    def __init__(self, inputs: Inputs, first_row: int = 0) -> None:
        self._known = inputs.known
        self._row = first_row
        self._states: list[Tensor] = []
        self.n_different = np.zeros(3, np.int64)

    def compare(self, *row: Tensor) -> None:
        """Take the next row: `W`, `exp_avg`, `exp_avg_sq` and `grad`."""
        *recorded, grad = row
        if not self._states:
            self._states = [state.clone() for state in recorded]
        else:
            step(self._states, grad, self._known, self._row)
            for index, state in enumerate(self._states):
                n_different = count_different(state, recorded[index])
                if n_different:
                    self.n_different[index] += n_different
                    state.copy_(recorded[index])
        self._row += 1


def from_bits(*arrays: np.ndarray) -> list[Tensor]:
    """Return what the bits stand for, as views."""
    return [torch.from_numpy(bits).view(torch.bfloat16) for bits in arrays]


def count_different(state: Tensor, recorded: Tensor) -> int:
    """Return how many elements differ in any bit."""
    ours, theirs = state.view(torch.int16), recorded.view(torch.int16)
    return 0 if torch.equal(ours, theirs) else int((ours != theirs).sum())


def step(states: Sequence[Tensor], grad: Tensor, known: Mapping[str, np.ndarray], row: int) -> None:
    """Take one step in place, with the program that was recorded."""
    W, exp_avg, exp_avg_sq = states
    implementation = str(known["implementation"])
    adam(
        [W],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(known["optimizer_step"][row] - 1, dtype=torch.float32)],
        foreach=implementation == "foreach",
        fused=implementation == "fused",
        decoupled_weight_decay=True,
        amsgrad=False,
        maximize=False,
        lr=float(known["learning_rate"][row]),
        beta1=float(known["beta1"][row]),
        beta2=float(known["beta2"][row]),
        weight_decay=float(known["weight_decay"][row]),
        eps=float(known["eps"][row]),
    )
