"""Every cause that can be named, planted in a sound record: what to do to its bits and scalars."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.optim.adam import adam

from tests.support.faults import Arrays, flip_bit

STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Planted:
    """A fault.

    `plant` changes bits and scalars at (or from) `step`, using `random`, and returns where it
    begins as far as that is defined: step, token and dim, None for those that are not.
    """

    code: str
    plant: Callable[[Arrays, Arrays, int, np.random.Generator], tuple[int | None, ...]]


def numbers(bits: np.ndarray) -> torch.Tensor:
    """The numbers that stored bits are; float32 or bfloat16."""
    tensor = torch.from_numpy(np.ascontiguousarray(bits))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def put(bits: np.ndarray, values: torch.Tensor) -> None:
    """Store numbers, rounded to the dtype of the bits."""
    native = numbers(bits).dtype
    rounded = values.to(native)
    bits[...] = (rounded.view(torch.uint16) if native == torch.bfloat16 else rounded).numpy()


def element(bits: Arrays, random: np.random.Generator) -> tuple[int, int]:
    _, n_tokens, n_dims = bits["W"].shape
    return int(random.integers(n_tokens)), int(random.integers(n_dims))


def bit_flip(name: str) -> Planted:
    def plant(bits, scalars, step, random):
        token, dim = element(bits, random)
        width = 8 * bits[name].dtype.itemsize
        flip_bit(bits[name], (step, token, dim), int(random.integers(width)))
        return step, token, dim

    return Planted("bit-flip", plant)


def missing_row(*names: str) -> Planted:
    def plant(bits, scalars, step, random):
        for name in names or tuple(bits):
            put(bits[name][step], torch.full(bits[name].shape[1:], torch.nan))
        return step, None, None

    return Planted("missing-row", plant)


def torn_row(bits, scalars, step, random):
    half = bits["W"].shape[1] // 2
    for name in ("W", *STATES):
        bits[name][step, half:] = bits[name][step - 1, half:]
    return step, None, None


def shifted(*names: str, by: int) -> Planted:
    def plant(bits, scalars, step, random):
        for name in names:
            rows = bits[name][1:]
            rows[max(by, 0) : len(rows) + min(by, 0)] = np.roll(rows, by, axis=0)[
                max(by, 0) : len(rows) + min(by, 0)
            ]
        return None, None, None

    return Planted("shifted-rows", plant)


def shifted_hyperparameters(bits, scalars, step, random):
    scalars["optimizer_step"][1:] -= 1
    return None, None, None


def permuted_rows(bits, scalars, step, random):
    for values in bits.values():
        values[[step, step + 5]] = values[[step + 5, step]]
    return step, None, None


def permuted_tokens(name: str, *, everywhere: bool) -> Planted:
    def plant(bits, scalars, step, random):
        order = random.permutation(bits[name].shape[1])
        rows = slice(1, None) if everywhere else slice(step, step + 1)
        bits[name][rows] = bits[name][rows][:, order]
        return None if everywhere else step, None, None

    return Planted("permuted-tokens", plant)


def scaled_gradient(bits, scalars, step, random):
    put(bits["grad"][1:], numbers(bits["grad"][1:]).double() * 2.0**10)
    return 1, None, None


def rescaled_gradient(bits, scalars, step, random):
    for row in range(step, len(bits["grad"])):
        put(bits["grad"][row], numbers(bits["grad"][row]).double() * random.uniform(1.2, 4))
    return step, None, None


def cast_states(lower: torch.dtype) -> Planted:
    def plant(bits, scalars, step, random):
        for name in STATES:
            put(bits[name], numbers(bits[name]).to(lower).double())
        return 1, None, None

    return Planted("cast-states", plant)


def other_hyperparameter(name: str, code: str, *, more: float) -> Planted:
    def plant(bits, scalars, step, random):
        scalars[name][step:] = 3 * scalars[name][step:] + more
        return step, None, None

    return Planted(code, plant)


def external_change(bits, scalars, step, random):
    """Move a few weights, and let the optimizer go on from there."""
    tokens = random.choice(bits["W"].shape[1], 3, replace=False)
    weight = numbers(bits["W"][step, tokens]).clone()
    weight += 0.25
    put_tokens(bits["W"][step], tokens, weight)
    for row in range(step + 1, len(bits["W"])):
        moments = [numbers(bits[name][row - 1, tokens]).clone() for name in STATES]
        adam(
            [weight],
            [numbers(bits["grad"][row, tokens])],
            [moments[0]],
            [moments[1]],
            [],
            [torch.tensor(row - 1.0)],
            foreach=False,
            fused=False,
            decoupled_weight_decay=True,
            amsgrad=False,
            maximize=False,
            lr=float(scalars["learning_rate"][row]),
            beta1=float(scalars["beta1"][row]),
            beta2=float(scalars["beta2"][row]),
            eps=float(scalars["eps"][row]),
            weight_decay=float(scalars["weight_decay"][row]),
        )
        put_tokens(bits["W"][row], tokens, weight)
    return step, int(tokens.min()), None


def put_tokens(row: np.ndarray, tokens: np.ndarray, values: torch.Tensor) -> None:
    some = row[tokens]
    put(some, values)
    row[tokens] = some


def wrong_gradient(bits, scalars, step, random):
    noise = torch.from_numpy(random.normal(size=bits["grad"].shape[1:]))
    put(bits["grad"][step], noise * numbers(bits["grad"][step]).double().std())
    return step, None, None


PLANTED = {
    "bit of W": bit_flip("W"),
    "bit of exp_avg": bit_flip("exp_avg"),
    "bit of exp_avg_sq": bit_flip("exp_avg_sq"),
    "missing row of W": missing_row("W"),
    "missing row of grad": missing_row("grad"),
    "missing row of everything": missing_row(),
    "torn row": Planted("torn-row", torn_row),
    "gradients one step late": shifted("grad", by=1),
    "gradients one step early": shifted("grad", by=-1),
    "states one step late": shifted(*STATES, by=1),
    "states one step early": shifted(*STATES, by=-1),
    "weights one step late": shifted("W", by=1),
    "weights one step early": shifted("W", by=-1),
    "step counted before the step": Planted("shifted-hyperparameters", shifted_hyperparameters),
    "two rows exchanged": Planted("permuted-rows", permuted_rows),
    "tokens of one row of W permuted": permuted_tokens("W", everywhere=False),
    "tokens of all gradients permuted": permuted_tokens("grad", everywhere=True),
    "gradient scaler's factor left in": Planted("scaled-gradient", scaled_gradient),
    "clipped after it was recorded": Planted("rescaled-gradient", rescaled_gradient),
    "another learning rate recorded": other_hyperparameter(
        "learning_rate", "other-learning-rate", more=0
    ),
    "another weight decay recorded": other_hyperparameter(
        "weight_decay", "other-weight-decay", more=3
    ),
    "three tokens changed by something else": Planted("external-change", external_change),
    "another gradient at one step": Planted("wrong-gradient", wrong_gradient),
}
"""Faults of any record."""

CAST_FLOAT32 = {
    "states through bfloat16": cast_states(torch.bfloat16),
    "states through float16": cast_states(torch.float16),
}
"""Faults of a float32 record; float16 for bfloat16 is one of a bfloat16 record too."""

CAST_BFLOAT16 = {"states through float16": cast_states(torch.float16)}
