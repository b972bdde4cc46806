"""A learning rate that changed from step to step, of a run whose file does not say so."""

from pathlib import Path

import numpy as np

from thimble_zarr.errors import ConfigError

_EXPECTED = (
    "expected a number such as 3e-4, linear:PEAK:STEPS such as linear:1e-3:1000, or a file of "
    "numbers, one for each step"
)


def read_learning_rate(spec: str, n_rows: int) -> np.ndarray:
    """Return the learning rate of each row: float64, NaN at the initial state.

    Parameters
    ----------
    spec
        A number, which every step has; `linear:PEAK:STEPS`, which falls from PEAK at step 1 to 0
        after so many steps, to the bit as `transformers.get_linear_schedule_with_warmup` without
        warm-up; or a file of numbers, one for each step, or for each row.
    n_rows
        Rows of the run: one more than steps.

    Raises
    ------
    ConfigError
        If it is none of them, or has numbers of another run.

    Examples
    --------
    >>> read_learning_rate("linear:1e-3:4", 5).tolist()
    [nan, 0.001, 0.00075, 0.0005, 0.00025]
    """
    rates = np.full(n_rows, np.nan)
    kind, _, rest = spec.partition(":")
    if kind == "linear":
        peak, _, steps = rest.partition(":")
        n_steps = _number(steps, spec)
        if n_steps < 1 or not n_steps.is_integer():
            raise ConfigError(f"the learning rate {spec!r} has no number of steps: {_EXPECTED}")
        base = _number(peak, spec)
        rates[1:] = [base * max(0.0, (n_steps - step) / n_steps) for step in range(n_rows - 1)]
    elif Path(spec).is_file():
        given = _from_file(Path(spec))
        if len(given) not in (n_rows, n_rows - 1):
            raise ConfigError(
                f"{spec} has {len(given):,} numbers, and the run {n_rows - 1:,} steps; expected "
                "one for each"
            )
        rates[1:] = given[len(given) - n_rows + 1 :]
    else:
        rates[1:] = _number(spec, spec)
    if not np.isfinite(rates[1:]).all():
        raise ConfigError(f"the learning rate {spec!r} is not finite at every step")
    return rates


def _number(text: str, spec: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{spec!r} is no learning rate: {_EXPECTED}") from error


def _from_file(file: Path) -> list[float]:
    try:
        return [float(word) for word in file.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read a learning rate from {file}: {error}") from error
