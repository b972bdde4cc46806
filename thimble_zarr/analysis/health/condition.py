"""What a condition is: something about a run that its owner wants to know, with a name."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from thimble_zarr.analysis.health.measurements import Measurements
from thimble_zarr.format.documents import finite
from thimble_zarr.format.schema import Json

Facts = Mapping[str, str | int | float]
"""What a condition found out, `step` among it, where it begins: the blanks of its message."""

Find = Callable[[Measurements], Iterator[Facts]]
"""Yields what is found out each time that a run is in a condition."""


@dataclass(frozen=True, kw_only=True)
class Concern:
    """Something that a person wants to know of a run, although its record is sound.

    Attributes
    ----------
    code
        The condition's name.
    message
        What is so, and the numbers that show it, in words.
    step
        Where it begins.
    evidence
        The same numbers, by name.
    """

    code: str
    message: str
    step: int
    evidence: Facts

    def to_json(self) -> dict[str, Json]:
        """Return the concern as JSON has it: what is not a finite number is null."""
        known: dict[str, Json] = {"code": self.code, "message": self.message, "step": self.step}
        return known | {"evidence": finite(self.evidence)}


@dataclass(frozen=True)
class Condition:
    """Something that a run can be in. Facts fill the blanks of its message."""

    code: str
    message: str
    find: Find

    def concerns(self, of: Measurements) -> Iterator[Concern]:
        """Yield what there is to say of a run that is in this condition; nothing of another."""
        for facts in self.find(of):
            message = self.message.format_map(facts).replace("%", " %")
            step = int(facts["step"])
            evidence = {name: value for name, value in facts.items() if name != "step"}
            yield Concern(code=self.code, message=message, step=step, evidence=evidence)


def condition(code: str) -> Callable[[Find], Condition]:
    """Make a condition of a function that finds it, whose docstring is the message."""

    def of_function(find: Find) -> Condition:
        return Condition(code, " ".join((inspect.getdoc(find) or "").split()), find)

    return of_function
