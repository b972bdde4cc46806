"""The numbers of an audit as a table: columns by step, as xarray has them."""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from thimble_zarr.analysis.audit import NOT_FINITE, OF_REPLAY, Audit, Tally

COLUMNS = ("norm_predicted", "norm_observed", "norm_difference", "cosine_similarity", "ratio")
"""What the original notebook tabulates."""

EXTENDED = ("share_stalled", "share_moved", "mean_displacement_ulp", "norm_unexplained")
"""What is tabulated besides; the last only with the replay."""


def tabulated(audit: Audit, numbers: np.ndarray) -> xr.Dataset:
    """Return the table of an audit.

    Parameters
    ----------
    audit
        What was compared.
    numbers
        What its reduction gave, shape `(class, number, step)`.

    Returns
    -------
    xarray.Dataset
        As `analysis.accounting.accounting` returns it.
    """
    reduction = audit.reduction
    selected, classes = reduction.selected, reduction.classes
    source, n_dims = selected.source, len(selected.dims)
    coords = {"step": selected.steps}
    if audit.tally.recurrences:
        coords["recurrence"] = np.array(audit.tally.recurrences)
    skipped = "step", source.skipped[np.asarray(selected.rows)].astype(np.int64)

    def table(of_classes: np.ndarray, n_tokens: int) -> xr.Dataset:
        parts = (numbers[index : index + 1] for index in np.flatnonzero(of_classes))
        (merged,) = reduction.statistics.merge(*parts)
        columns = _table(
            audit.tally,
            merged,
            n_elements=n_dims * n_tokens,
            n_dims=source.reader.schema.n_dims,
        )
        return columns.assign_coords(coords).assign(skipped=skipped)

    if audit.subsets is None or classes is None:
        return table(np.ones(1, bool), len(selected.tokens)).assign_attrs(audit.attrs)
    tables = [table(members, int(members[classes].sum())) for members in audit.subsets.values()]
    whole = xr.concat(tables, dim="subset").assign_coords(subset=list(audit.subsets))
    return whole.assign_attrs(audit.attrs)


def _table(tally: Tally, numbers: np.ndarray, *, n_elements: int, n_dims: int) -> xr.Dataset:
    """Return the columns that follow from the numbers of a subset, shape `(number, step)`."""
    by_name = dict(zip(tally.names, numbers, strict=False))
    columns = _formula_columns(by_name) if tally.formula else {}
    columns[NOT_FINITE] = by_name[NOT_FINITE].astype(np.int64)
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
    of_replay = numbers[len(tally.names) :].reshape(len(tally.recurrences), len(OF_REPLAY), -1)
    return table.assign(_replay_columns(of_replay, n_dims))


def _formula_columns(by_name: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `COLUMNS`, each of shape `(step,)`."""
    norm_predicted, norm_observed = np.sqrt(by_name["predicted"]), np.sqrt(by_name["observed"])
    norm_difference = np.sqrt(by_name["difference"])
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine_similarity = by_name["product"] / (norm_predicted * norm_observed)
        ratio = norm_predicted / norm_observed
    columns = norm_predicted, norm_observed, norm_difference, cosine_similarity, ratio
    return dict(zip(COLUMNS, columns, strict=True))


def _replay_columns(
    numbers: np.ndarray, n_dims: int
) -> dict[str, tuple[tuple[str, str], np.ndarray]]:
    """Return the variables with dims `(step, recurrence)`."""
    by_name = dict(zip(OF_REPLAY, numbers.transpose(1, 2, 0), strict=True))
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
