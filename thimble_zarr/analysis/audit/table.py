"""The numbers of an audit as a table: columns by step.

NumPy is all that this needs, so that the command line need not wait for xarray to be imported;
`analysis.accounting` makes a dataset of it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from thimble_zarr.analysis.audit.audit import NOT_FINITE, OF_REPLAY, ROUNDED, Audit, Tally
from thimble_zarr.analysis.compute.comparison import not_exact_because
from thimble_zarr.analysis.compute.source import TORCH

if TYPE_CHECKING:
    import xarray as xr

COLUMNS = ("norm_predicted", "norm_observed", "norm_difference", "cosine_similarity", "ratio")
"""What the original notebook tabulates."""

EXTENDED = ("share_stalled", "share_moved", "mean_displacement_ulp", "norm_unexplained")
"""What is tabulated besides; the last only with the replay."""

DIMS = ("step", "recurrence")
"""The labels of a table, and the axes of its columns."""


class Table(dict[str, np.ndarray]):
    """What `accounting.accounting` returns, as arrays by name.

    The columns have shape `(step,)` or `(step, recurrence)`, but for the number `n_elements`; the
    labels of both axes are under the names `DIMS`. `attrs` is what they depend on besides.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], attrs: Mapping[str, str]) -> None:
        super().__init__(columns)
        self.attrs = dict(attrs)


AnyTable: TypeAlias = "Table | xr.Dataset"
"""A table, or the dataset that was made of it: both have columns by name, and attributes."""


def counts(table: AnyTable, name: str) -> np.ndarray:
    """Return counts, int64; zero at steps that are not there, as of the shorter of two runs."""
    values: np.ndarray = np.nan_to_num(np.asarray(table[name])).astype(np.int64)
    return values


def has_formula(table: AnyTable) -> bool:
    """Return whether a table has the columns of the formula."""
    return COLUMNS[0] in table


def tabulated(audit: Audit, numbers: np.ndarray) -> list[Table]:
    """Return the tables of an audit: one for each subset, or one of all that is selected.

    `numbers` is what its reduction gave, of shape `(class, number, step)`.
    """
    reduction, selected = audit.reduction, audit.reduction.selected
    one_class = np.zeros(len(selected.tokens), int)
    classes = one_class if reduction.classes is None else reduction.classes
    labels = {"step": selected.steps}
    if audit.tally.recurrences:
        labels["recurrence"] = np.array(audit.tally.recurrences)
    skipped = {"skipped": selected.source.skipped[np.asarray(selected.rows)].astype(np.int64)}
    tables = []
    for members in audit.members:
        parts = (numbers[index : index + 1] for index in np.flatnonzero(members))
        (merged,) = reduction.statistics.merge(*parts)
        n_elements = int(members[classes].sum()) * len(selected.dims)
        columns = _columns(audit.tally, merged, n_elements, selected.source.reader.schema.n_dims)
        tables.append(Table(labels | columns | skipped, _attrs(audit, columns)))
    return tables


def _attrs(audit: Audit, columns: Mapping[str, np.ndarray]) -> Mapping[str, str]:
    """Return what columns depend on besides: also on torch, where that was asked."""
    attrs, source = audit.attrs, audit.reduction.selected.source
    replayed = columns.get("n_different")
    if audit.tally.exact is not None or replayed is None or not replayed.any():
        return attrs
    by = f"{attrs['replayed_by']}, and by {TORCH} where that differs"
    return {**attrs, "replayed_by": by, "not_exact_because": not_exact_because(source)}


def _columns(
    tally: Tally, numbers: np.ndarray, n_elements: int, n_dims: int
) -> dict[str, np.ndarray]:
    """Return the columns that follow from the numbers of a subset, shape `(number, step)`."""
    by_name = dict(zip(tally.names, numbers, strict=False))
    columns = {}
    if tally.formula:
        norms = [np.sqrt(by_name[name]) for name in ("predicted", "observed", "difference")]
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine_similarity = by_name["product"] / (norms[0] * norms[1])
            ratio = norms[0] / norms[1]
        columns = dict(zip(COLUMNS, (*norms, cosine_similarity, ratio), strict=True))
    columns[NOT_FINITE] = by_name[NOT_FINITE].astype(np.int64)
    if tally.extended:
        columns["share_moved"] = by_name["n_moved"] / n_elements
        columns["share_stalled"] = by_name["n_stalled"] / n_elements
        columns["mean_displacement_ulp"] = by_name["displacement"] / n_elements
    columns["n_elements"] = np.array(n_elements)
    if not tally.recurrences and not tally.formula:
        return columns
    if not tally.recurrences:
        return columns | {name: by_name[name].astype(np.int64) for name in ROUNDED}
    columns["norm_unexplained"] = np.sqrt(by_name["unexplained"])
    of_replay = numbers[len(tally.names) :].reshape(len(tally.recurrences), len(OF_REPLAY), -1)
    return columns | _replay_columns(of_replay, n_dims)


def _replay_columns(numbers: np.ndarray, n_dims: int) -> dict[str, np.ndarray]:
    """Return the columns of shape `(step, recurrence)`."""
    by_name = dict(zip(OF_REPLAY, numbers.transpose(1, 2, 0), strict=True))
    is_there = np.isfinite(by_name["first"])
    position = np.where(is_there, by_name["first"], 0).astype(np.int64)
    return {
        "n_different": by_name["n_different"].astype(np.int64),
        "n_beyond": by_name["n_beyond"].astype(np.int64),
        "n_unbounded": by_name["n_unbounded"].astype(np.int64),
        "max_ulp": by_name["max_ulp"].copy(),  # a view would hold all the numbers
        "first_token": np.where(is_there, position // n_dims, -1),
        "first_dim": np.where(is_there, position % n_dims, -1),
    }
