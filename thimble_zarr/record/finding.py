"""What an audit found: a step that is not what its optimizer makes of the row before."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thimble_zarr.optim.base import Optimizer


@dataclass(frozen=True, kw_only=True)
class AuditFinding:
    """A step that does not follow from the row before, and the first of its elements that is wrong.

    Attributes
    ----------
    path
        The store, which has the step and all before it.
    parameter
        Its name; empty where it has none.
    step, token, dim, variable
        Where the element is. The token is its id in the whole parameter.
    recorded, computed
        What was recorded there, and what the optimizer's step gives.
    n_wrong
        By variable how many elements of the step are wrong, where any are.
    cause
        What may have happened, in words, as far as one step tells.
    """

    path: Path
    parameter: str
    step: int
    token: int
    dim: int
    variable: str
    recorded: float
    computed: float
    n_wrong: Mapping[str, int]
    cause: str

    def __str__(self) -> str:
        of = f" of {self.parameter}" if self.parameter else ""
        wrong = ", ".join(f"{n:,} of {name}" for name, n in self.n_wrong.items())
        store, steps = shlex.quote(str(self.path)), f"{self.step}:{self.step}"
        return (
            f"step {self.step:,}{of} does not follow from the row before: at token {self.token}, "
            f"dim {self.dim}, {self.variable} is {self.recorded!r}, and the optimizer's step gives "
            f"{self.computed!r} (elements that are wrong: {wrong}). {self.cause}. Everything is "
            f"recorded; `thimble-zarr check {store} --steps {steps}` says more"
        )


def likely_cause(optimizer: Optimizer, n_wrong: Mapping[str, int], n_elements: int) -> str:
    """Return what may have happened, from how many elements of each variable are wrong."""
    states = [state.name for state in optimizer.states]
    wrong = [name for name in states if name in n_wrong]
    if not wrong and 2 * n_wrong["W"] > n_elements:
        return (
            "The learning rate or another setting is not the one that the step used, or all of W "
            "was changed outside of the step"
        )
    if not states:
        return "W was changed outside of the step, or the gradient does not fit"
    if not wrong:
        return "W was changed outside of the step"
    # A maximum that is kept need not notice another gradient.
    fading = [state.name for state in optimizer.states if state.decay is not None] or states
    if "W" in n_wrong and {*fading} <= {*wrong}:
        return "The gradient does not fit: it is not the one that the step consumed"
    return f"{' and '.join(wrong)} changed outside of the step"
