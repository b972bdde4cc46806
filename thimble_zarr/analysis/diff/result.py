"""Where two runs differ, as data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from thimble_zarr.format.documents import finite
from thimble_zarr.format.location import Location
from thimble_zarr.format.schema import Json, Schema


@dataclass(frozen=True)
class Difference:
    """The first value of a variable that differs.

    Attributes
    ----------
    variable, step, token, dim
        Where it is; token and dim are None of a number that is one a step.
    a, b
        Both values; NaN is missing.
    ulp
        How many numbers of their dtype they are apart, infinite where one is missing. None where
        the dtypes differ.
    n_different, n_elements
        How many elements of the variable differ at that step, and how many there are.
    """

    variable: str
    step: int
    token: int | None
    dim: int | None
    a: float
    b: float
    ulp: float | None
    n_different: int
    n_elements: int


@dataclass(frozen=True)
class Growth:
    """How far a variable of two runs is apart at a step.

    Attributes
    ----------
    variable, step
        Of what.
    n_different, n_elements
        How many elements differ, and how many there are.
    relative
        The norm of the difference, over that of the values of the first run.
    max_ulp
        The largest distance; None where the dtypes differ.
    """

    variable: str
    step: int
    n_different: int
    n_elements: int
    relative: float
    max_ulp: float | None

    @property
    def share(self) -> float:
        """The share of elements that differ."""
        return self.n_different / self.n_elements


@dataclass(frozen=True)
class Setting:
    """What two runs say of themselves and is not the same; None where one says nothing."""

    name: str
    a: Json
    b: Json


@dataclass(frozen=True)
class Cause:
    """Which came first: a code, the step, the variable or number of the step, and why, in words."""

    code: str
    step: int
    variable: str
    message: str


@dataclass(frozen=True)
class Compared:
    """What was compared.

    Attributes
    ----------
    steps, n_steps
        First and last step that both runs have, and how many there are.
    n_only_a, n_only_b
        Steps that only one has.
    n_tokens
        Tokens that both have; rows, of a parameter without tokens.
    variables, other_dtypes
        What both have, and of that what has another dtype in each: its exact values are compared.
    by_checksum, by_value
        Chunks that were recognised as equal by their recorded checksums, and chunks that were
        decoded. Where a difference is found the rest of the variable is not looked at.
    """

    steps: tuple[int, int]
    n_steps: int
    n_only_a: int
    n_only_b: int
    n_tokens: int
    variables: tuple[str, ...]
    other_dtypes: tuple[str, ...]
    by_checksum: int
    by_value: int


@dataclass(frozen=True, kw_only=True)
class ParameterDiff:
    """Where a parameter of two runs differs.

    Attributes
    ----------
    parameters
        Its names, which are None where nobody said.
    schemas
        What each run says of itself.
    compared
        What was compared.
    differences
        The first difference of each variable and number that has one: by step, and in a step what
        leads to the others first.
    growth
        How far they are apart, at the first step that differs, one, two, four, ... steps after it,
        and at the last.
    settings
        What the runs say of themselves and is not the same.
    cause
        Which came first; None if nothing differs.
    """

    parameters: tuple[str | None, str | None]
    schemas: tuple[Schema, Schema]
    compared: Compared
    differences: tuple[Difference, ...]
    growth: tuple[Growth, ...]
    settings: tuple[Setting, ...]
    cause: Cause | None

    @property
    def name(self) -> str:
        """The parameter's name, or both where they are not the same."""
        return " / ".join(dict.fromkeys(name or "-" for name in self.parameters))

    @property
    def first(self) -> Difference | None:
        """The first difference of what came first; None if nothing differs."""
        if self.cause is None:
            return None
        return next(of for of in self.differences if of.variable == self.cause.variable)

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs in what was compared."""
        return not self.differences

    def to_json(self) -> dict[str, Json]:
        """Return it as JSON has it: what is no finite number is null."""
        return {
            "parameters": [*self.parameters],
            "equal": self.is_equal,
            "cause": None if self.cause is None else asdict(self.cause),
            "differences": [finite(asdict(of)) for of in self.differences],
            "growth": [finite(asdict(of) | {"share": of.share}) for of in self.growth],
            "settings": [asdict(of) for of in self.settings],
            "compared": _listed(asdict(self.compared)),
        }


@dataclass(frozen=True)
class DiffResult:
    """What `diff` found: of each parameter that both runs have.

    Attributes
    ----------
    a, b
        The runs.
    parameters
        What was compared.
    only_a, only_b
        Parameters that only one run has.
    """

    a: Location
    b: Location
    parameters: tuple[ParameterDiff, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether all that both runs have is equal, to the bit."""
        return all(parameter.is_equal for parameter in self.parameters)

    @property
    def diverged(self) -> ParameterDiff | None:
        """The parameter in which the runs differ first; None if they do not."""
        found = [of for of in self.parameters if of.cause is not None]
        return min(found, key=_when, default=None)

    @property
    def first(self) -> Difference | None:
        """The first difference; None if there is none."""
        return None if self.diverged is None else self.diverged.first

    @property
    def cause(self) -> Cause | None:
        """Which came first, of all parameters; None if nothing differs."""
        return None if self.diverged is None else self.diverged.cause

    def to_json(self) -> dict[str, Json]:
        """Return what `thimble-zarr diff --format json` prints."""
        diverged, first, cause = self.diverged, self.first, self.cause
        return {
            "a": str(self.a),
            "b": str(self.b),
            "equal": self.is_equal,
            "cause": None if cause is None else asdict(cause),
            "parameter": None if diverged is None else diverged.name,
            "first": None if first is None else finite(asdict(first)),
            "parameters": [parameter.to_json() for parameter in self.parameters],
            "only_a": [*self.only_a],
            "only_b": [*self.only_b],
        }


def _when(parameter: ParameterDiff) -> tuple[int, int]:
    """Return the step of the first difference, and before a weight what moves it."""
    first = parameter.first
    assert first is not None
    if first.token is None:
        return first.step, 0
    return first.step, {"grad": 1, "W": 3}.get(first.variable, 2)


def _listed(values: Mapping[str, Json]) -> dict[str, Json]:
    return {name: [*of] if isinstance(of, tuple) else of for name, of in values.items()}
