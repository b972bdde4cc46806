"""The per-step table: do formula and replay explain what the weights did?

One fused pass: each task reads some tokens of a few blocks, evaluates the formula and replays the
optimizer window by window, and keeps a few numbers a step. Changes of 16-bit weights are compared
in float32, which is finer than they by 13 bits or more, all others in float64. Sums over tokens are
float64, so cosines stay within [-1, 1].
"""

import functools
from collections.abc import Iterator, Mapping
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
from thimble_zarr.analysis.variables import (
    adam_decay,
    adam_update,
    decays,
    how_to_record,
    missing_inputs,
    rounding_bound,
    ulp,
)
from thimble_zarr.analysis.windows import Window
from thimble_zarr.errors import SelectionError
from thimble_zarr.format.bits import decode, storage_dtype
from thimble_zarr.format.schema import Schema

COLUMNS = ("norm_predicted", "norm_observed", "norm_difference", "cosine_similarity", "ratio")
"""What the original notebook tabulates."""

EXTENDED = ("share_stalled", "share_moved", "mean_displacement_ulp", "norm_unexplained")
"""What is tabulated besides; the last only with the replay."""

_OF_FORMULA = ("predicted", "observed", "difference", "product", "n_not_finite")
_OF_MOVES = ("n_moved", "n_stalled", "displacement")
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
        If `ds` is no longer lazy, or is of several runs.
    """
    if "run" in ds.dims:
        raise SelectionError("this is of one run; select it with `ds.sel(run=...)`")
    if "W" not in ds or not isinstance(ds.W.data, LazyArray):
        raise SelectionError(
            "this needs the lazy variables of `open_dataset`; select steps and tokens with "
            "`ds.sel`, and do not load or compute the dataset first"
        )
    return ds.W.data


def is_checkable(ds: xr.Dataset) -> np.ndarray:
    """Return which of the selected rows follow a recorded one, and so can be checked.

    Parameters
    ----------
    ds
        A dataset from `open_dataset`, still lazy.

    Returns
    -------
    numpy.ndarray
        bool, shape `(step,)`.
    """
    variable = lazy_variable(ds)
    rows, n_rows = np.asarray(variable.matrix[0]), variable.source.reader.n_rows
    follows: np.ndarray = variable.source.follows[np.minimum(rows, n_rows - 1)] & (rows < n_rows)
    return follows


def check_inputs(schema: Schema, *, replay: bool) -> None:
    """Raise SelectionError unless what the formula, or the replay, needs was recorded."""
    missing = missing_inputs("adam_residual", schema)
    if missing:
        raise SelectionError(
            "neither AdamW's formula nor the replay can be checked: "
            f"{how_to_record(missing, schema)}"
        )
    missing = missing_inputs("unexplained", schema)
    if replay and missing:
        raise SelectionError(
            f"the steps cannot be replayed: {how_to_record(missing, schema)}. The formula alone "
            "can be checked, with replay=False (--no-replay)"
        )


def accounting(
    ds: xr.Dataset,
    *,
    replay: bool = True,
    extended: bool = False,
    subsets: Mapping[str, np.ndarray] | None = None,
    device: str | None = None,
) -> xr.Dataset:
    """Compare, step by step, the recorded rows with AdamW's formula and with torch's own program.

    Parameters
    ----------
    ds
        A dataset from `open_dataset` or `open_datasets`, of a parameter of any rank, whole or with
        anything selected. It must still be lazy: not loaded, and not changed by arithmetic.
    replay
        Whether to take every step again with torch and compare bits. Without it a bound on rounding
        judges the formula.
    extended
        Whether to add the columns `EXTENDED`.
    subsets
        By name, ids of tokens of `ds`, which are positions along the first axis. All subsets are
        compared in one pass over the store.
    device
        Where to replay, as torch names it. Where the run was recorded, if None, or on the CPU
        where there is no such device.

    Returns
    -------
    xarray.Dataset
        In memory, dims `(step,)`, or `(subset, step)` with subsets, without the initial state and
        steps whose row before was not recorded, float64 but for the counts:
        ``norm_predicted``, ``norm_observed``, ``norm_difference``
            L2 norms over the selected elements of predicted and observed change and of their
            difference.
        ``cosine_similarity``
            Of predicted and observed change; NaN where one of them is zero.
        ``ratio``
            `norm_predicted / norm_observed`; infinite where nothing moved.
        ``n_not_finite``
            Elements whose residual is NaN or infinite, because the run diverged or a value is
            missing. int64.
        ``skipped``
            1 where the optimizer skipped the step, as with a `GradScaler` that found an infinity,
            or for want of a gradient; else 0. int64.

        Extended:
        ``share_moved``, ``share_stalled``
            Share of elements that moved, and of those that did not although the formula moves them.
        ``mean_displacement_ulp``
            Mean distance an element moved, in units of the spacing of the dtype at the weight.

        Without the replay:
        ``n_beyond_rounding``
            Elements whose residual is larger than rounding can make it
            (`optim.adamw.rounding_bound`), or is not finite. int64; 0 in a sound record.

        With the replay ``norm_unexplained``, the norm of observed minus replayed weights, and, with
        one more dim `recurrence`, for `W`, `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`):
        ``n_different``
            Elements whose bits are not those of the replay. int64; 0 in a sound record.
        ``n_beyond``
            Those that differ by more than they may: all, if the replay is exact; else those beyond
            what rounding allows two programs (`optim.adamw.recurrence_bounds`). int64.
        ``max_ulp``
            The largest distance from the replay.
        ``first_token``, ``first_dim``
            The first element that differs beyond that, or else at all; -1 where none does. int64.
            A token is a position along the first axis of the parameter, a dim one along all others,
            flattened.

        ``n_elements`` counts the elements of a step, dims `()` or `(subset,)`. The attribute
        `not_exact_because` says why the replay need not give the recorded bits, and is empty where
        it must.

        Runs are gone through one after the other and have a dim `run` before the others. Counts
        are float64 with NaN where a run is shorter than another, and attributes that differ between
        the runs are left out.

    Raises
    ------
    SelectionError
        If no token or no step is selected that can be checked, a variable that is needed was not
        recorded, `ds` is no longer lazy, or the device is not there.
    """
    if "run" in ds.dims and ds.sizes["run"]:
        of_run = functools.partial(
            accounting, replay=replay, extended=extended, subsets=subsets, device=device
        )
        tables = [of_run(ds.isel(run=run)) for run in range(ds.sizes["run"])]
        return xr.concat(tables, ds.run, join="outer", combine_attrs="drop_conflicts")
    check_inputs(lazy_variable(ds).source.reader.schema, replay=replay)
    checkable = is_checkable(ds)
    if "step" in ds.dims and not checkable.all():
        ds = ds.isel(step=checkable)
    variable, steps = lazy_variable(ds).on_device(device), np.atleast_1d(ds.step.values)
    if variable.size == 0 or not checkable.any():
        raise SelectionError(
            "nothing is selected that can be checked: an accounting needs at least one token and "
            "one step whose row before was recorded, and this selection has "
            f"{dict(ds.W.sizes)}"
        )
    source = variable.source
    attrs = {"dtype": source.reader.schema.dtypes["W"]}
    if replay:
        attrs["device"] = replay_device(source)
        attrs["not_exact_because"] = not_exact_because(source)
    tally = _Tally(
        recurrences(source.reader.schema) if replay else (),
        exact=not attrs.get("not_exact_because"),
        extended=extended,
    )
    rows, tokens, dims = variable.matrix
    members, classes = _classes(source.token_ids[np.asarray(tokens)], subsets)
    narrow = storage_dtype(source.reader.schema.dtypes["W"]).itemsize == 2
    statistics = Statistics(tally, tally.combine, np.float32 if narrow else np.float64)
    numbers = variable.reduce_rows(statistics, classes).compute()
    tables = [
        _table(
            tally,
            statistics.merge(*(numbers[i : i + 1] for i in np.flatnonzero(members_of)))[0],
            n_elements=len(dims) * int(np.isin(classes, np.flatnonzero(members_of)).sum()),
            n_dims=source.reader.schema.n_dims,
        )
        for members_of in members
    ]
    coords = {"step": steps} | ({"recurrence": list(tally.recurrences)} if replay else {})
    skipped = "step", source.skipped[np.asarray(rows)].astype(np.int64)
    tables = [table.assign_coords(coords).assign(skipped=skipped) for table in tables]
    if subsets is None:
        return tables[0].assign_attrs(attrs)
    return xr.concat(tables, dim="subset").assign_coords(subset=list(subsets)).assign_attrs(attrs)


def _classes(
    tokens: np.ndarray, subsets: Mapping[str, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sort tokens by the subsets they are in, so that none is gone through twice.

    Returns
    -------
    numpy.ndarray
        Whether a subset has a class, bool, shape `(subset, class)`.
    numpy.ndarray
        The class of each token; no subset has the last one, of tokens that are in none.
    """
    if subsets is None:
        return np.ones((1, 1), bool), np.zeros(len(tokens), np.int64)
    for name, ids in subsets.items():
        if len(unknown := np.setdiff1d(ids, tokens)):
            raise SelectionError(f"subset {name} has tokens that are not selected: {unknown[0]}")
        if len(ids) == 0:
            raise SelectionError(f"subset {name} is empty")
    of_token = np.stack([np.isin(tokens, ids) for ids in subsets.values()])
    members, classes = np.unique(of_token, axis=1, return_inverse=True)
    return members, classes.reshape(-1)


def _table(tally: "_Tally", numbers: np.ndarray, *, n_elements: int, n_dims: int) -> xr.Dataset:
    """Return the columns that follow from the numbers of a subset, shape `(number, step)`."""
    by_name = dict(zip(tally.names, numbers, strict=False))
    norm_predicted, norm_observed = np.sqrt(by_name["predicted"]), np.sqrt(by_name["observed"])
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = {
            "norm_predicted": norm_predicted,
            "norm_observed": norm_observed,
            "norm_difference": np.sqrt(by_name["difference"]),
            "cosine_similarity": by_name["product"] / (norm_predicted * norm_observed),
            "ratio": norm_predicted / norm_observed,
            "n_not_finite": by_name["n_not_finite"].astype(np.int64),
        }
    if tally.extended:
        columns["share_moved"] = by_name["n_moved"] / n_elements
        columns["share_stalled"] = by_name["n_stalled"] / n_elements
        columns["mean_displacement_ulp"] = by_name["displacement"] / n_elements
    table = xr.Dataset({name: ("step", values) for name, values in columns.items()})
    table["n_elements"] = n_elements
    if not tally.recurrences:
        table["n_beyond_rounding"] = "step", by_name["n_beyond_rounding"].astype(np.int64)
        return table
    table["norm_unexplained"] = "step", np.sqrt(by_name["unexplained"])
    of_replay = numbers[len(tally.names) :].reshape(len(tally.recurrences), len(_OF_REPLAY), -1)
    return table.assign(_replay_columns(of_replay, n_dims))


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
        "max_ulp": by_name["max_ulp"].copy(),  # a view would hold all the numbers
        "first_token": np.where(np.isfinite(first), position // n_dims, -1),
        "first_dim": np.where(np.isfinite(first), position % n_dims, -1),
    }
    return {name: (("step", "recurrence"), values) for name, values in columns.items()}


@dataclass(frozen=True)
class _Tally:
    """Computes the numbers of a part of a window.

    They are those of `names`, then `_OF_REPLAY` for each recurrence.
    """

    recurrences: tuple[str, ...]
    exact: bool
    extended: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The numbers that are of the weights alone."""
        judged = "unexplained" if self.recurrences else "n_beyond_rounding"
        return *_OF_FORMULA, *(_OF_MOVES if self.extended else ()), judged

    @property
    def combine(self) -> tuple[np.ufunc, ...]:
        of_replay = tuple(_OF_REPLAY.values()) * len(self.recurrences)
        return (np.add,) * len(self.names) + of_replay

    def __call__(self, part: Window) -> Iterator[np.ndarray]:
        yield from self._of_formula(part)
        if self.recurrences:
            yield from _of_replay(part, exact=self.exact)

    def _of_formula(self, part: Window) -> Iterator[np.ndarray]:
        previous, current = part.previous("W"), part.current("W")
        update = adam_update(part, out=part.memory("update"))
        predicted = update
        if part.of_rows(decays):
            predicted = adam_decay(part)
            predicted += update
        observed = np.subtract(current, previous, out=part.memory("observed"))
        sums = [_dot(predicted, predicted), _dot(observed, observed)]
        beyond = _beyond_float32(sums[0], predicted) or _beyond_float32(sums[1], observed)
        product = _dot(predicted, observed)
        moves = list(_of_moves(part, observed, predicted)) if self.extended else []
        difference = np.subtract(observed, predicted, out=observed)  # which is not needed any more
        sums += [_dot(difference, difference), product]
        beyond = beyond or _beyond_float32(sums[2], difference)
        if beyond and part.dtype != np.float64:
            yield from self._of_formula(part.in_float64())
            return
        yield from sums
        yield _NONE if np.isfinite(sums[2]).all() else _count(~np.isfinite(difference))
        yield from moves
        if not self.recurrences:
            bound = rounding_bound(part, update, out=(update, part.memory("bound")))
            explained = np.abs(difference, out=difference) <= bound  # NaN is not explained
            yield _NONE if explained.all() else _count(~explained)


_NONE = np.zeros(1)


def _dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the sum of products of each step, float64 but for the products of one token.

    So it does not depend on which tokens are added together first.
    """
    sums: np.ndarray = np.vecdot(left, right).sum(axis=1, dtype=np.float64)
    return sums


def _beyond_float32(squares: np.ndarray, values: np.ndarray) -> bool:
    """Return whether squares of float32 values overflowed, or may have underflowed."""
    suspect = ~((squares > _LEAST_SQUARE) & (squares < np.inf))
    if not suspect.any():
        return False
    values = values[suspect]
    return bool(values.max() > 0 or values.min() < 0)  # `any` takes several times as long


_LEAST_SQUARE = 1e-25
"""Sums of squares below are computed in float64: some squares may be no float32 number."""


def _count(elements: np.ndarray) -> np.ndarray:
    counts: np.ndarray = np.count_nonzero(elements, axis=(1, 2))
    return counts


def _of_moves(part: Window, observed: np.ndarray, predicted: np.ndarray) -> Iterator[np.ndarray]:
    moved = observed != 0
    yield _count(moved)
    yield _count(~moved & (predicted != 0))
    yield np.abs(observed / ulp(part)).sum(axis=(1, 2))


def _of_replay(part: Window, *, exact: bool) -> Iterator[np.ndarray]:
    after = replayed(part)
    comparisons = compare(part, after, exact=exact)
    differs = comparisons["W"].differs
    if not differs.any():
        yield _NONE
    else:
        native = part.source.reader.schema.dtypes["W"]
        replay = decode(after["W"], native, np.float64)
        unexplained = np.where(differs, part.current("W") - replay, 0.0)
        yield _dot(unexplained, unexplained)
    for comparison in comparisons.values():
        if not comparison.differs.any():
            yield from (_NONE, _NONE, _NONE, _NOWHERE)
            continue
        yield _count(comparison.differs)
        yield _count(comparison.beyond)
        yield comparison.distance.max(axis=(1, 2))
        beyond = comparison.beyond.any(axis=(1, 2), keepdims=True)
        wrong = np.where(beyond, comparison.beyond, comparison.differs)
        yield np.where(wrong, part.positions, np.inf).min(axis=(1, 2))


_NOWHERE = np.full(1, np.inf)
