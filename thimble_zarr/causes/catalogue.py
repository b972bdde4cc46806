"""The known causes, and the first of them that explains a failure."""

from dataclasses import asdict, dataclass
from typing import Self

import numpy as np

from thimble_zarr.causes import gradients_and_scalars, rows_and_tokens
from thimble_zarr.causes.cause import Cause, Facts, Named
from thimble_zarr.causes.evidence import Evidence, Failure
from thimble_zarr.causes.recorded_rows import RecordedRows

CAUSES: tuple[Cause, ...] = tuple(
    one
    for module in (rows_and_tokens, gradients_and_scalars)
    for one in vars(module).values()
    if isinstance(one, Cause)
)
"""In the order in which they are tried: those that prove themselves to the bit first."""

NO_FAULTS = frozenset(cause.code for cause in CAUSES if not cause.is_fault)
"""Codes of what is right to happen."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A named cause.

    Attributes
    ----------
    code
        The cause's name.
    message
        What is wrong and how that is known, in words.
    variable
        The array that is wrong, where that is known.
    step, token, dim
        Where it begins. None where a whole step or every token is concerned. A token is a position
        along the first axis of the parameter, a dim one along all others, flattened.
    n_steps
        Steps that fail because of it.
    """

    code: str
    message: str
    variable: str | None
    step: int
    token: int | None
    dim: int | None
    n_steps: int

    @classmethod
    def of(cls, cause: Named, facts: Facts, rows: RecordedRows) -> Self:
        """Name a cause. Its facts have rows and positions instead of steps and token ids."""
        schema = rows.reader.schema
        step, token, dim = (facts.get(axis) for axis in ("step", "token", "dim"))
        step = int(rows.steps[step])
        token = None if token is None else int(rows.token_ids[token])
        dim = None if dim is None else int(dim)
        words = dict(facts) | {
            "step": step,
            "place": "" if token is None else schema.place(token, dim),
            "row": schema.row_name,
        }
        return cls(
            code=cause.code,
            message=cause.message.format(**words),
            variable=facts.get("variable"),
            step=step,
            token=token,
            dim=dim,
            n_steps=facts["n_steps"],
        )

    def to_json(self) -> dict[str, str | int | None]:
        """Return the finding as JSON has it."""
        return asdict(self)


def explain(evidence: Evidence, failure: Failure) -> Finding:
    """Return the first of the known causes that explains a failure; the last one always does."""
    has_formula = evidence.schema.optimizer.formula is not None
    asked = (cause for cause in CAUSES if has_formula or not cause.needs_formula)
    with np.errstate(all="ignore"):
        explained = ((cause, cause.explain(evidence, failure)) for cause in asked)
        cause, facts = next((cause, facts) for cause, facts in explained if facts is not None)
    step, token, dim, variable = failure.start
    place = {} if cause.is_everywhere else {"token": token, "dim": dim}
    known = {"step": step, "variable": variable, "n_steps": len(failure.steps)} | place
    return Finding.of(cause, known | dict(facts), evidence.source)
