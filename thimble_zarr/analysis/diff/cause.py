"""Which came first: data, schedule, kernel, a resume, or a change that no step made?

Within a step one thing leads to the next: the numbers of the step, the gradient, the states, the
weights. So the first of them that differs names the cause, if the row before is equal. Two rows
that were equal before a step may still not be so for another reason than the gradient: somebody
wrote into the weights in between. That is what the replay is for: torch takes the step again from
the row before, in each run, and the run whose row does not follow is the one that was changed.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.analysis.diff.pair import Pair
from thimble_zarr.analysis.diff.result import Cause, Difference, Setting
from thimble_zarr.analysis.diff.settings import configuration, environment
from thimble_zarr.bits import decode, unit_roundoff
from thimble_zarr.errors import ConfigError, SelectionError
from thimble_zarr.format.location import Location
from thimble_zarr.format.reader import Reader
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.formula import Precision

LOSS = "loss"


def in_order(pair: Pair, differences: Sequence[Difference]) -> tuple[Difference, ...]:
    """Return differences by step, and in one by what leads to what.

    What is logged leads to nothing: it is a sign, and comes last in its step.
    """
    states = [name for name in pair.variables if name not in ("W", "grad")]
    later = {
        name: place
        for place, name in enumerate((COUNT, "grad", *states, "W", LOSS, *pair.logged), 1)
    }

    def place(of: Difference) -> tuple[int, int]:
        is_first_weight = of.step == 0 and of.variable == "W"
        return of.step, -1 if is_first_weight else later.get(of.variable, 0)

    return tuple(sorted(differences, key=place))


@dataclass(frozen=True)
class Inquiry:
    """Asks why runs differ from a step on.

    Attributes
    ----------
    pair, paths
        The runs.
    differences
        As `in_order` returns them.
    settings
        What the runs say of themselves and is not the same.
    replay
        Whether torch may take the step again.
    """

    pair: Pair
    paths: tuple[Location, Location]
    differences: tuple[Difference, ...]
    settings: tuple[Setting, ...]
    replay: bool = True
    _found: dict[int, str | None] = field(default_factory=dict, init=False, compare=False)

    @property
    def step(self) -> int:
        """The first step at which anything differs."""
        return self.differences[0].step

    @property
    def names(self) -> list[str]:
        """What differs at that step, what leads to the others first."""
        return [of.variable for of in self.differences if of.step == self.step]

    def cause(self) -> Cause:
        """Return which came first."""
        place = int(np.searchsorted(self.pair.steps, self.step))
        before = int(self.pair.steps[place - 1]) if place else None
        first = self.names[0]
        if first == LOSS or first in self.pair.logged:
            what, other = ("The loss", "loss") if first == LOSS else (first, first)
            return self._told(
                "loss",
                f"{what} differs first, and nothing recorded of the parameter does at that step: "
                f"another {other} was logged, or what differs was not recorded",
            )
        if first in self.pair.scalars and first != COUNT:
            return self._of_a_number(first)
        if before is None:
            return self._at_the_beginning(first)
        if before != self.step - 1:
            return self._told(
                "between-steps",
                f"The runs are equal at step {before:,}, differ at step {self.step:,}, and not "
                "both recorded the steps between",
            )
        return self._of_a_step(first)

    def _told(self, code: str, message: str, variable: str | None = None) -> Cause:
        return Cause(code, self.step, variable or self.names[0], f"{message}.")

    def _of_a_number(self, name: str) -> Cause:
        """Tell a setting, which differs from the first step on, from a schedule."""
        values, at = self.pair.scalar(name), int(np.searchsorted(self.pair.steps, self.step))
        was_known = any((~np.isnan(of[:at])).any() for of in values)
        a, b = (float(of[at]) for of in values)
        code, since = "configuration", "from the first step on"
        if was_known:
            code, since = "schedule", f"from step {self.step:,} on, and is equal before it"
        return self._told(code, f"{name} is {a:g} in A and {b:g} in B {since}")

    def _at_the_beginning(self, first: str) -> Cause:
        if self.step > 0:
            return self._told(
                "before-the-record",
                f"{first} differs at step {self.step:,}, the first that both recorded: the runs "
                "parted before it",
            )
        if first == "W":
            return self._told(
                "initial-weights",
                "The weights differ before the first step: another seed, or another initialisation",
            )
        return self._told(
            "initial-states",
            f"{first} differs before the first step: one optimizer had taken steps already",
        )

    def _of_a_step(self, first: str) -> Cause:
        """Name what differs at a step whose row before is equal in both runs."""
        anew = [
            side for side, of in self._each() if self.step > 1 and _began_anew(of, self._row(side))
        ]
        if len(anew) == 1:
            return self._told(
                "resume",
                f"The states of {'AB'[anew[0]]} began anew at step {self.step:,}, as those of a "
                "run that was resumed without them",
            )
        if first == COUNT:
            return self._told(
                "skipped-step",
                "One optimizer counted the step and the other did not: it was skipped there, "
                "without a gradient or by a GradScaler",
            )
        resumed = [side for side, of in self._each() if self.step - 1 in _resumed_after(of)]
        if changed := [side for side in (0, 1) if self._why_not(side) is not None]:
            return self._changed(changed, resumed)
        return self._of_what_a_step_consumes(first, resumed)

    def _of_what_a_step_consumes(self, first: str, resumed: Sequence[int]) -> Cause:
        """Name what differs where every step follows from the row before, as far as is known."""
        was = f" ({_named(resumed)} was resumed after step {self.step - 1:,})" if resumed else ""
        if first == "grad":
            return self._told(
                "data",
                f"The gradient of step {self.step:,} is the first that differs, and weights and "
                f"states before it are equal{was}: other data, or another program that computed "
                f"the gradient{self._surroundings()}",
            )
        if "grad" not in self.pair.variables:
            return self._told(
                "data-or-kernel",
                f"{first} differs first{was}; not both recorded the gradient, which would tell "
                "whether the data or the optimizer's program is another",
            )
        if resumed:
            return self._told(
                "resume",
                f"{first} differs first, and the gradient is equal{was}: what was resumed is not "
                "what was recorded",
            )
        if flags := [setting.name for setting in configuration(self.settings)]:
            return self._told(
                "configuration",
                f"{first} differs first, and gradient and row before are equal. The runs differ in "
                f"{', '.join(flags)}",
            )
        return self._told(
            "kernel",
            f"{first} differs first, and gradient and row before are equal: another program, "
            f"device or library took the step{self._surroundings()}",
        )

    def _changed(self, changed: Sequence[int], resumed: Sequence[int]) -> Cause:
        """Name a change that no step made, in the runs whose row does not follow."""
        whose, why = _named(changed), next(filter(None, map(self._why_not, changed)), "")
        told = f"step {self.step:,} of {whose} does not follow from the row before it{why}"
        if set(changed) & set(resumed):
            return self._told("resume", f"{_named(resumed)} was resumed, and {told}")
        if self.names == ["grad"] or self.names == ["grad", LOSS]:
            what = f"grad is not what its step consumed: {told}"
            return self._told("changed-without-step", what, "grad")
        # A gradient that differs, too, was computed from the weights that were changed.
        moved = [name for name in self.names if name not in ("grad", COUNT)]
        name = "W" if "W" in moved and "grad" in self.names else moved[0]
        return self._told("changed-without-step", f"{name} changed without its step: {told}", name)

    def _surroundings(self) -> str:
        """Return what else is not the same and may be why, in words."""
        names = [setting.name for setting in environment(self.settings)]
        return f". The runs differ in {', '.join(names)}" if names else ""

    def _each(self) -> list[tuple[int, Reader]]:
        return [*enumerate(self.pair.readers)]

    def _row(self, side: int) -> int:
        place = int(np.searchsorted(self.pair.steps, self.step))
        return int(self.pair.rows[side][place])

    def _why_not(self, side: int) -> str | None:
        """Return why the step does not follow in a run; None if it does, or nobody can tell."""
        if side not in self._found:
            self._found[side] = self._replayed(side) if self.replay else None
        return self._found[side]

    def _replayed(self, side: int) -> str | None:
        from thimble_zarr.analysis.audit.table import counts
        from thimble_zarr.analysis.check import check

        name = self.pair.readers[side].schema.parameter
        try:
            result = check(
                self.paths[side],
                tokens="all",
                steps=str(self.step),
                parameters=[glob.escape(name)] if name else (),
                formula=False,
            )
        except (ConfigError, SelectionError):  # what the replay needs was not recorded
            return None
        # A run that diverged does not hold, but NaN may well follow from the NaN of a gradient.
        replayed = (of.numbers for of in result if "n_beyond" in of.numbers)
        differs = any(counts(numbers, "n_beyond").any() for numbers in replayed)
        if not differs and not result.findings:
            return None
        return "".join(f" ({finding.code}: {finding.message})" for finding in result.findings[:1])


def _named(sides: Sequence[int]) -> str:
    return " and ".join("AB"[side] for side in sides)


def _resumed_after(reader: Reader) -> Sequence[int]:
    return reader.read_history().resumed_after


def _began_anew(reader: Reader, row: int) -> bool:
    """Return whether the states after a step are those of a first step, as far as rounding allows.

    That is asked of the tokens that make a sample.
    """
    schema, formula = reader.schema, reader.schema.optimizer.formula
    states = {state.name: state.first for state in schema.optimizer.states}
    names = ("W", "grad", *states)
    is_known = all(name in schema.dtypes for name in names) and None not in states.values()
    if formula is None or not states or not is_known:
        return False
    tokens = range(min(schema.n_tokens, max(1, tuning.TUNING.sample_elements // schema.n_dims)))

    def values(name: str, at: int) -> np.ndarray:
        bits = reader.read(name, (at, at + 1), tokens)
        return decode(bits, schema.dtypes[name], np.float64)

    weight = values("W", row - 1)
    before = {"W": weight} | {
        name: np.full_like(weight, first) for name, first in states.items() if first is not None
    }
    scalars = {name: of[row] for name, of in reader.read_scalars().items()}
    precision = Precision.of(schema.dtypes["W"], scalars="float32", ours=unit_roundoff("float64"))
    grad = values("grad", row)
    with np.errstate(all="ignore"):
        expected = formula.advance(before, grad, scalars)
        allowed = formula.bounds(before, grad, scalars, precision)
        return all(
            bool((np.abs(values(name, row) - expected[name]) <= allowed[name]).all())
            for name in states
        )
