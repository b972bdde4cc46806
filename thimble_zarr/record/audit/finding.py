"""What an audit found: a step that is not what its optimizer makes of the row before."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class AuditFinding:
    """A step that does not follow from the row before, and the first of its elements that is wrong.

    Attributes
    ----------
    path
        The store, which has or will have the step and all before it.
    parameter
        Its name; empty where it has none.
    since
        Where it is not the row before, the step of the row that it does not follow from: with
        `keep="keyframes"` the last that was copied whole.
    step, token, dim, variable
        Where the element is. The token is its id in the whole parameter.
    recorded, computed
        What was recorded there, and what the optimizer's step gives.
    n_wrong
        By variable how many elements of the step are wrong, where any are.
    code, cause
        The cause's name, and what may have happened in words, as `check` has them: as far as the
        rows tell that are in memory.
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
    code: str
    cause: str
    since: int | None = None

    def __str__(self) -> str:
        of = f" of {self.parameter}" if self.parameter else ""
        wrong = ", ".join(f"{n:,} of {name}" for name, n in self.n_wrong.items())
        store, steps = shlex.quote(str(self.path)), f"{self.step}:{self.step}"
        before, gives, is_there = "the row before", "the optimizer's step gives", "Everything"
        if self.since is not None:
            before, gives, is_there = f"step {self.since:,}", "the steps between give", "The rest"
            steps = f"{self.since}:{self.step}"
        return (
            f"step {self.step:,}{of} does not follow from {before}: at token {self.token}, "
            f"dim {self.dim}, {self.variable} is {self.recorded!r}, and {gives} "
            f"{self.computed!r} (elements that are wrong: {wrong}). {self.code}: {self.cause} "
            f"{is_there} is recorded; `thimble-zarr check {store} --steps {steps}` says more"
        )
