"""What goes wrong while a toy run trains: what no step changes, or no step was."""

from collections.abc import Callable
from dataclasses import dataclass, field

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
    mean: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean = self.loop.weight.detach().clone()

    def take_step(self) -> None:
        """Take a step, and the weights into their moving average (EMA)."""
        self.loop.optimizer.zero_grad()
        self.loop.step()
        self.mean.lerp_(self.loop.weight.detach(), 0.1)

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
    steps later. `variable` is the first that is wrong there, and `code` the cause's name.
    """

    plant: Callable[[Training], object]
    after: int
    variable: str
    code: str


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
    """Put the moving average of the weights in their place, as for an evaluation."""
    with torch.no_grad():
        training.loop.weight.copy_(training.mean)


def lower_recorded_rate(training: Training) -> None:
    """Let the row of the last step have the learning rate of the next."""
    block = training.recorder._writer.block
    block.scalars["learning_rate"][block.n_rows - 1] *= 0.5


ALIENS = {
    "bit of W": Alien(lambda training: training.flip_live("W", 12), 1, "W", "external-change"),
    "bit of exp_avg": Alien(
        lambda training: training.flip_live("exp_avg", 14), 1, "exp_avg", "unbalanced"
    ),
    "bit of exp_avg_sq": Alien(
        lambda training: training.flip_live("exp_avg_sq", 13), 1, "exp_avg_sq", "unbalanced"
    ),
    "bit of W in the row": Alien(
        lambda training: training.flip_recorded("W", 3), 0, "W", "bit-flip"
    ),
    "bit of grad in the row": Alien(
        lambda training: training.flip_recorded("grad", 14), 0, "exp_avg", "bit-flip"
    ),
    "alien write": Alien(write, 1, "W", "external-change"),
    "clamp": Alien(clamp, 1, "W", "external-change"),
    "copy of a mean": Alien(copy_back, 1, "W", "external-change"),
    "learning rate of the next step": Alien(lower_recorded_rate, 0, "W", "other-learning-rate"),
}
"""Each in a bfloat16 run of AdamW."""
