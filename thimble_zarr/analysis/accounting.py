"""The per-step table: do formula and replay explain what the weights did?

One fused pass: each task reads a few blocks, evaluates the formula and replays the optimizer window
by window, and keeps a few numbers a step. Sums are float64, so cosines stay within [-1, 1].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

from thimble_zarr.analysis.lazy import LazyArray, Statistics
from thimble_zarr.analysis.recurrences import (
    compare,
    not_exact_because,
    recurrences,
    replay_device,
    replayed,
)
from thimble_zarr.analysis.variables import adam_decay, adam_update, rounding_bound, ulp
from thimble_zarr.analysis.windows import Window
from thimble_zarr.errors import SelectionError
from thimble_zarr.format.bits import decode

COLUMNS = ("norm_predicted", "norm_observed", "norm_difference", "cosine_similarity", "ratio")
"""What the original notebook tabulates."""

EXTENDED = ("share_stalled", "share_moved", "mean_displacement_ulp", "norm_unexplained")
"""What is tabulated besides; the last only with the replay."""

_SUMS = (
    "predicted",
    "observed",
    "difference",
    "product",
    "n_beyond_rounding",
    "n_not_finite",
    "n_moved",
    "n_stalled",
    "displacement",
)
_OF_REPLAY = {
    "n_different": np.add,
    "n_beyond": np.add,
    "max_ulp": np.maximum,
    "first": np.minimum,
}


def lazy_variable(ds: xr.Dataset) -> LazyArray:
    """Return a variable of a dataset that still knows what is selected of which recording.

    Raises
    ------
    SelectionError
        If `ds` is no longer lazy.
    """
    if "adam_residual" not in ds or not isinstance(ds.adam_residual.data, LazyArray):
        raise SelectionError(
            "this needs the lazy variables of `open_dataset`; select steps and tokens with "
            "`ds.sel`, and do not load or compute the dataset first"
        )
    return ds.adam_residual.data


def accounting(ds: xr.Dataset, *, replay: bool = True, device: str | None = None) -> xr.Dataset:
    """Compare, step by step, the recorded rows with AdamW's formula and with torch's own program.

    Parameters
    ----------
    ds
        A dataset from `open_dataset`, whole or with any steps, tokens or dims selected. It must
        still be lazy: not loaded, and not changed by arithmetic.
    replay
        Whether to take every step again with torch and compare bits.
    device
        Where to do that, as torch names it. Where the run was recorded, if None, or on the CPU
        where there is no such device.

    Returns
    -------
    xarray.Dataset
        In memory, dims `(step,)`, without the initial state, float64 but for the counts:
        ``norm_predicted``, ``norm_observed``, ``norm_difference``
            L2 norms over the selected elements of predicted and observed change and of their
            difference.
        ``cosine_similarity``
            Of predicted and observed change; NaN where one of them is zero.
        ``ratio``
            `norm_predicted / norm_observed`; infinite where nothing moved.
        ``n_beyond_rounding``
            Elements whose residual is larger than rounding can make it
            (`optim.adamw.rounding_bound`), or is not finite. int64; 0 in a sound record.
        ``n_not_finite``
            Elements whose residual is NaN or infinite, because the run diverged or a value is
            missing. int64.
        ``share_moved``, ``share_stalled``
            Share of elements that moved, and of those that did not although the formula moves them.
        ``mean_displacement_ulp``
            Mean distance an element moved, in units of the spacing of the dtype at the weight.

        With the replay also ``norm_unexplained``, the norm of observed minus replayed weights, and,
        dims `(step, recurrence)`, for `W`, `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`):
        ``n_different``
            Elements whose bits are not those of the replay. int64; 0 in a sound record.
        ``n_beyond``
            Those that differ by more than they may: all, if the replay is exact; else those beyond
            what rounding allows two programs (`optim.adamw.recurrence_bounds`). int64.
        ``max_ulp``
            The largest distance from the replay.
        ``first_token``, ``first_dim``
            The first element that differs beyond that, or else at all; -1 where none does. int64.

        The attribute `not_exact_because` says why the replay need not give the recorded bits, and
        is empty where it must.

    Raises
    ------
    SelectionError
        If no token or no step is selected, `ds` is no longer lazy, or the device is not there.
    """
    lazy_variable(ds)
    if "step" in ds.dims:
        ds = ds.sel(step=ds.step > 0)
    variable, steps = lazy_variable(ds).on_device(device), np.atleast_1d(ds.step.values)
    if variable.size == 0 or steps[0] == 0:
        raise SelectionError(
            "nothing is selected: an accounting needs at least one token and one step after the "
            f"initial state, and this selection has {dict(ds.adam_residual.sizes)}"
        )
    source = variable.source
    attrs = {"n_elements": variable.size // len(steps), "dtype": ds.attrs["dtype"]}
    names: tuple[str, ...] = ()
    if replay:
        names = recurrences(source.reader.schema)
        attrs["device"] = replay_device(source)
        attrs["not_exact_because"] = not_exact_because(source)
    tally = _Tally(names, exact=not attrs.get("not_exact_because"))
    statistics = Statistics(tally, tally.combine)
    numbers = variable.reduce_rows(statistics).compute().T
    table = _columns(dict(zip(_SUMS, numbers, strict=False)), attrs["n_elements"])
    if replay:
        table["norm_unexplained"] = np.sqrt(numbers[len(_SUMS)])
    result = xr.Dataset(
        {name: ("step", values) for name, values in table.items()},
        coords={"step": steps},
        attrs=attrs,
    )
    if not replay:
        return result
    of_replay = numbers[len(_SUMS) + 1 :].reshape(len(names), len(_OF_REPLAY), len(steps))
    return result.assign(_replay_columns(of_replay, source.reader.schema.n_dims)).assign_coords(
        recurrence=list(names)
    )


def _columns(sums: dict[str, np.ndarray], n_elements: int) -> dict[str, np.ndarray]:
    norm_predicted, norm_observed = np.sqrt(sums["predicted"]), np.sqrt(sums["observed"])
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "norm_predicted": norm_predicted,
            "norm_observed": norm_observed,
            "norm_difference": np.sqrt(sums["difference"]),
            "cosine_similarity": sums["product"] / (norm_predicted * norm_observed),
            "ratio": norm_predicted / norm_observed,
            "n_beyond_rounding": sums["n_beyond_rounding"].astype(np.int64),
            "n_not_finite": sums["n_not_finite"].astype(np.int64),
            "share_moved": sums["n_moved"] / n_elements,
            "share_stalled": sums["n_stalled"] / n_elements,
            "mean_displacement_ulp": sums["displacement"] / n_elements,
        }


def _replay_columns(
    numbers: np.ndarray, n_dims: int
) -> dict[str, tuple[tuple[str, str], np.ndarray]]:
    """Return the variables with dims `(step, recurrence)`."""
    by_name = dict(zip(_OF_REPLAY, numbers.transpose(1, 2, 0), strict=True))
    first = by_name["first"]
    position = np.where(np.isfinite(first), first, 0).astype(np.int64)
    columns = {
        "n_different": by_name["n_different"].astype(np.int64),
        "n_beyond": by_name["n_beyond"].astype(np.int64),
        "max_ulp": by_name["max_ulp"],
        "first_token": np.where(np.isfinite(first), position // n_dims, -1),
        "first_dim": np.where(np.isfinite(first), position % n_dims, -1),
    }
    return {name: (("step", "recurrence"), values) for name, values in columns.items()}


@dataclass(frozen=True)
class _Tally:
    """Computes a window's numbers: those of the formula, then those of each replayed recurrence."""

    recurrences: tuple[str, ...]
    exact: bool

    @property
    def combine(self) -> tuple[np.ufunc, ...]:
        of_replay = (np.add, *(tuple(_OF_REPLAY.values()) * len(self.recurrences)))
        return (np.add,) * len(_SUMS) + (of_replay if self.recurrences else ())

    def __call__(self, window: Window) -> list[np.ndarray]:
        numbers = list(_of_formula(window))
        if self.recurrences:
            numbers.extend(_of_replay(window, exact=self.exact))
        return numbers


def _of_formula(window: Window) -> Iterator[np.ndarray]:
    previous, current = window.previous("W"), window.current("W")
    update = adam_update(window)
    predicted = update + adam_decay(window)
    observed = current - previous
    difference = observed - predicted
    explained = np.abs(difference) <= rounding_bound(window, update)  # NaN is not explained
    yield np.einsum("std,std->s", predicted, predicted)
    yield np.einsum("std,std->s", observed, observed)
    yield np.einsum("std,std->s", difference, difference)
    yield np.einsum("std,std->s", predicted, observed)
    yield np.count_nonzero(~explained, axis=(1, 2))
    yield np.count_nonzero(~np.isfinite(difference), axis=(1, 2))
    moved = observed != 0
    yield np.count_nonzero(moved, axis=(1, 2))
    yield np.count_nonzero(~moved & (predicted != 0), axis=(1, 2))
    yield np.abs(observed / ulp(window)).sum(axis=(1, 2))


def _of_replay(window: Window, *, exact: bool) -> Iterator[np.ndarray]:
    after = replayed(window)
    comparisons = compare(window, after, exact=exact)
    differs = comparisons["W"].differs
    unexplained = np.zeros(differs.shape)
    if differs.any():
        native = window.source.reader.schema.dtypes["W"]
        replay = decode(after["W"], native, np.float64)
        unexplained[differs] = (window.current("W") - replay)[differs]
    yield np.einsum("std,std->s", unexplained, unexplained)
    for comparison in comparisons.values():
        yield np.count_nonzero(comparison.differs, axis=(1, 2))
        yield np.count_nonzero(comparison.beyond, axis=(1, 2))
        yield comparison.distance.max(axis=(1, 2))
        beyond = comparison.beyond.any(axis=(1, 2), keepdims=True)
        wrong = np.where(beyond, comparison.beyond, comparison.differs)
        yield np.where(wrong, window.positions, np.inf).min(axis=(1, 2))
