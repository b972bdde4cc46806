"""What goes wrong while a toy run trains: what no step changes, or no step was."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tests.support.runs import Loop
from thimble_zarr import Recorder
from thimble_zarr.bits import patterns


@dataclass
class Training:
    """A toy run while it is recorded."""

    loop: Loop
    recorder: Recorder
    random: np.random.Generator

    def take_step(self) -> None:
        self.loop.optimizer.zero_grad()
        self.loop.step()

    def flip_live(self, name: str, bit: int) -> None:
        """Flip a bit of the weights or of a state, where the next step finds it."""
        weight = self.loop.weight
        tensor = weight.data if name == "W" else self.loop.optimizer.state[weight][name]
        bits = tensor.view(torch.int16).view(-1)
        bits[int(self.random.integers(len(bits)))] ^= 1 << bit

    def flip_recorded(self, name: str, bit: int) -> None:
        """Flip a bit of the last row in memory, of the number that is largest."""
        block = self.recorder._writer.block
        row = block.bits()[name][block.n_rows - 1]
        place = np.abs(row.astype(np.int32) & 0x7FFF).argmax()
        patterns(row).reshape(-1)[place] ^= np.uint16(1 << bit)


@dataclass(frozen=True)
class Alien:
    """A fault.

    `plant` is called after a step; the first row that does not follow is that of the step `after`
    steps later. `variable` is the first that is wrong there, and `words` are in the cause.
    """

    plant: Callable[[Training], object]
    after: int
    variable: str
    words: str


def write(training: Training) -> None:
    """Write a few weights, as code beside the optimizer does."""
    with torch.no_grad():
        training.loop.weight[training.random.integers(11, size=3)] += 0.25


def clamp(training: Training) -> None:
    """Clamp the weights at three quarters of the largest."""
    weight = training.loop.weight
    with torch.no_grad():
        weight.clamp_(max=0.75 * float(weight.max()))


def copy_back(training: Training) -> None:
    """Put a mean of these and earlier weights in their place, as at the end of an EMA."""
    weight = training.loop.weight
    with torch.no_grad():
        weight.lerp_(torch.zeros_like(weight), 0.1)


def lower_recorded_rate(training: Training) -> None:
    """Let the row of the last step have the learning rate of the next."""
    block = training.recorder._writer.block
    block.scalars["learning_rate"][block.n_rows - 1] *= 0.5


ALIENS = {
    "bit of W": Alien(lambda training: training.flip_live("W", 12), 1, "W", "W was changed"),
    "bit of exp_avg": Alien(
        lambda training: training.flip_live("exp_avg", 14), 1, "exp_avg", "exp_avg changed"
    ),
    "bit of exp_avg_sq": Alien(
        lambda training: training.flip_live("exp_avg_sq", 13), 1, "exp_avg_sq", "exp_avg_sq changed"
    ),
    "bit of W in the row": Alien(
        lambda training: training.flip_recorded("W", 3), 0, "W", "W was changed"
    ),
    "bit of grad in the row": Alien(
        lambda training: training.flip_recorded("grad", 14), 0, "exp_avg", "gradient does not fit"
    ),
    "alien write": Alien(write, 1, "W", "W was changed"),
    "clamp": Alien(clamp, 1, "W", "W was changed"),
    "copy of a mean": Alien(copy_back, 1, "W", "all of W was changed"),
    "learning rate of the next step": Alien(lower_recorded_rate, 0, "W", "learning rate"),
}
"""Each in a bfloat16 run of AdamW."""
