"""Every cause that can be named, planted in a sound record: what to do to its bits and scalars."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tests.support.faults import Arrays, flip_bit
from thimble_zarr.optim.base import COUNT, WEIGHT_DECAY, Optimizer
from thimble_zarr.optim.lanes import Lanes
from thimble_zarr.optim.replay import Program
from thimble_zarr.optim.specs.adam import Adam


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
    for name in {*bits} - {"grad"}:
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
    scalars[COUNT][1:] -= 1
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
        for name in {*bits} - {"W", "grad"}:
            put(bits[name], numbers(bits[name]).to(lower).double())
        return 1, None, None

    return Planted("cast-states", plant)


def other_hyperparameter(name: str, code: str, *, more: float) -> Planted:
    def plant(bits, scalars, step, random):
        scalars[name][step:] = 3 * scalars[name][step:] + more
        return step, None, None

    return Planted(code, plant)


def external_change(optimizer: Optimizer) -> Planted:
    """Move a few weights, and let the optimizer go on from there."""

    def plant(bits, scalars, step, random):
        _, n_tokens, n_dims = bits["W"].shape
        tokens = np.sort(random.choice(n_tokens, 3, replace=False))
        put_tokens(bits["W"][step], tokens, numbers(bits["W"][step, tokens]) + 0.25)
        natives = {name: str(numbers(of).dtype).removeprefix("torch.") for name, of in bits.items()}
        program = Program(optimizer, natives, "cpu")
        lanes = Lanes.of(
            optimizer.implementation,
            n_elements=n_tokens * n_dims,
            n_threads=torch.get_num_threads(),
        )
        pieces = lanes.split((tokens[:, np.newaxis] * n_dims + np.arange(n_dims)).ravel())
        for row in range(step + 1, len(bits["W"])):
            before = {name: of[row - (name != "grad"), tokens] for name, of in bits.items()}
            known = {name: float(values[row]) for name, values in scalars.items()}
            for name, after in program.step(before, pieces, known).items():
                bits[name][row, tokens] = after
        return step, int(tokens[0]), None

    return Planted("external-change", plant)


def put_tokens(row: np.ndarray, tokens: np.ndarray, values: torch.Tensor) -> None:
    some = row[tokens]
    put(some, values)
    row[tokens] = some


def wrong_gradient(bits, scalars, step, random):
    noise = torch.from_numpy(random.normal(size=bits["grad"].shape[1:]))
    put(bits["grad"][step], noise * numbers(bits["grad"][step]).double().std())
    return step, None, None


def planted_in(optimizer: Optimizer) -> dict[str, Planted]:
    """Return the faults that a record of an optimizer can have, by what was done to it.

    A number that steps do not take can be any, and a count that torch does not have.
    """
    states = [state.name for state in optimizer.states]
    shifts = {"gradients": ["grad"], "states": states, "weights": ["W"]}
    found = {f"bit of {name}": bit_flip(name) for name in ("W", *states)}
    found |= {
        "missing row of W": missing_row("W"),
        "missing row of grad": missing_row("grad"),
        "missing row of everything": missing_row(),
        "torn row": Planted("torn-row", torn_row),
    }
    for what, names in shifts.items():
        if names:
            found[f"{what} one step late"] = shifted(*names, by=1)
            found[f"{what} one step early"] = shifted(*names, by=-1)
    if optimizer.STEP_KEY is not None:
        found["step counted before the step"] = Planted(
            "shifted-hyperparameters", shifted_hyperparameters
        )
    found |= {
        "two rows exchanged": Planted("permuted-rows", permuted_rows),
        "tokens of one row of W permuted": permuted_tokens("W", everywhere=False),
        "tokens of all gradients permuted": permuted_tokens("grad", everywhere=True),
        "gradient scaler's factor left in": Planted("scaled-gradient", scaled_gradient),
        "clipped after it was recorded": Planted("rescaled-gradient", rescaled_gradient),
        "three tokens changed by something else": external_change(optimizer),
        "another gradient at one step": Planted("wrong-gradient", wrong_gradient),
    }
    if optimizer.RATE not in getattr(optimizer, "NOT_TAKEN", ()):
        found["another learning rate recorded"] = other_hyperparameter(
            optimizer.RATE, "other-learning-rate", more=0
        )
    if WEIGHT_DECAY.name in optimizer.scalars:
        found["another weight decay recorded"] = other_hyperparameter(
            WEIGHT_DECAY.name, "other-weight-decay", more=3
        )
    return found


PLANTED = planted_in(Adam(name="AdamW", implementation="single", decoupled_weight_decay=True))
"""Faults of any record of AdamW."""

CAST_FLOAT32 = {
    "states through bfloat16": cast_states(torch.bfloat16),
    "states through float16": cast_states(torch.float16),
}
"""Faults of a float32 record; float16 for bfloat16 is one of a bfloat16 record too."""

CAST_BFLOAT16 = {"states through float16": cast_states(torch.float16)}
