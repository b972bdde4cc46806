"""Choose which steps are recorded, so that each of them can be checked."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import log10

from thimble_zarr.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Says of a step, counted from 1, whether it is recorded; kept as its text. `|` joins two."""

    text: str
    includes: Callable[[int], bool]

    def __call__(self, step: int) -> bool:
        """Return whether a step is to be recorded."""
        return self.includes(step)

    def __str__(self) -> str:
        return self.text

    def __or__(self, other: Callable[[int], bool]) -> "Schedule":
        second = as_schedule(other)
        return Schedule(f"{self} | {second}", lambda step: self(step) or second(step))


def every(n_steps: int) -> Schedule:
    """Record the multiples of `n_steps`.

    Raises
    ------
    ConfigError
        If it is not a whole number from 1 up.

    Examples
    --------
    >>> [step for step in range(1, 31) if every(10)(step)]
    [10, 20, 30]
    """
    text = f"every({n_steps!r})"
    _require(type(n_steps) is int and n_steps > 0, text, "a whole number from 1 up")
    return Schedule(text, lambda step: step % n_steps == 0)


def windows(*spans: tuple[int, int]) -> Schedule:
    """Record spans of steps, from the first to the last of each.

    Raises
    ------
    ConfigError
        If one is not a first and a last step.

    Examples
    --------
    >>> schedule = windows((1, 3), (20, 21)) | every(10)
    >>> [step for step in range(1, 31) if schedule(step)]
    [1, 2, 3, 10, 20, 21, 30]
    """
    text = f"windows({', '.join(str(tuple(span)) for span in spans)})"
    sound = (
        len(span) == 2 and all(type(step) is int for step in span) and 0 <= span[0] <= span[1]
        for span in spans
    )
    _require(bool(spans) and all(sound), text, "pairs of a first and a last step, both recorded")
    return Schedule(text, lambda step: any(first <= step <= last for first, last in spans))


def log_spaced(per_decade: int = 10) -> Schedule:
    """Record steps that grow by a constant factor: 1 to 10, then every tenth part of a decade.

    There are `per_decade` between a power of ten and the next; in the first decades fewer.

    Raises
    ------
    ConfigError
        If `per_decade` is not a whole number from 1 up.

    Examples
    --------
    >>> [step for step in range(1, 200) if log_spaced(4)(step)]
    [1, 2, 3, 6, 10, 18, 32, 56, 100, 178]
    """
    text = f"log_spaced({per_decade!r})"
    _require(type(per_decade) is int and per_decade > 0, text, "a whole number from 1 up")

    def includes(step: int) -> bool:
        nearest = round(per_decade * log10(step))
        return step in (round(10 ** (n / per_decade)) for n in range(nearest - 1, nearest + 2))

    return Schedule(text, includes)


def as_schedule(schedule: Callable[[int], bool]) -> Schedule:
    """Return a function as a schedule, or raise ConfigError if it cannot be called."""
    if isinstance(schedule, Schedule):
        return schedule
    if not callable(schedule):
        raise ConfigError(
            f"the schedule is {schedule!r}; expected every(10), windows((0, 100), (1000, 1100)), "
            "log_spaced(), or any function of a step that says whether to record it"
        )
    name = getattr(schedule, "__qualname__", None)
    return Schedule(f"{schedule.__module__}.{name}" if name else repr(schedule), schedule)


def row_choice(schedule: Schedule | None) -> Callable[[int], bool]:
    """Return which rows are recorded: those of the scheduled steps, and the row before each."""
    if schedule is None:
        return lambda row: True
    asked = lru_cache(4)(schedule)  # once of each step, in order, as long as rows are
    return lambda row: bool((row > 0 and asked(row)) or asked(row + 1))


def count_rows(schedule: Schedule | None, n_steps: int) -> int:
    """Return how many rows a run of so many steps records."""
    return sum(map(row_choice(schedule), range(n_steps + 1)))


def _require(holds: bool, text: str, expected: str) -> None:  # noqa: FBT001
    if not holds:
        raise ConfigError(f"the schedule {text} cannot work; expected {expected}")
