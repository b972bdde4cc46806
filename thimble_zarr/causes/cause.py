"""What a cause is: something that can be wrong with a record, with a name and a message."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from thimble_zarr.causes.evidence import Evidence, Failure

Facts = Mapping[str, Any]
"""What a cause found out: the blanks of its message, and `step`, `token`, `dim`, `variable` where
they are other than those of the first wrong element. Step and token are given as to `Evidence`."""

Explain = Callable[[Evidence, Failure], Facts | None]
"""Returns what is found out if something is the cause of a failure, else None."""


@dataclass(frozen=True)
class Named:
    """Something that can be wrong with a record. Facts fill the blanks of its message."""

    code: str
    message: str


ROWS_NOT_KEPT = Named(
    "rows-not-kept",
    "W and the states are missing at step{steps}: training did not copy them (keep='keyframes'), "
    "and {why}. These steps, and the one after them, cannot be checked.",
)


@dataclass(frozen=True)
class Cause(Named):
    """Something that shows in the replay.

    `is_local` says whether each place is a finding of its own, `is_everywhere` whether every token
    is concerned, and not the one that fails first. `is_fault` is false of what is right to happen.
    """

    explain: Explain
    is_local: bool = False
    is_everywhere: bool = False
    needs_formula: bool = False
    is_fault: bool = True


def cause(code: str, **flags: bool) -> Callable[[Explain], Cause]:
    """Make a cause of a function that explains failures, whose docstring is the message."""

    def of_function(explain: Explain) -> Cause:
        message = " ".join((inspect.getdoc(explain) or "").split())
        return Cause(code, message, explain, **flags)

    return of_function
