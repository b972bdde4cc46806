"""The health of a run that has a summary, which knows of all of its steps and tokens."""

import numpy as np
import xarray as xr

from thimble_zarr.analysis.audit.accounting import selected
from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.analysis.health.condition import Concern
from thimble_zarr.analysis.health.conditions import concerns_of
from thimble_zarr.analysis.health.measurements import Measurements, Updates

ALL = "all"
"""The group of all tokens."""


def health(ds: xr.Dataset, summary: xr.Dataset) -> tuple[Concern, ...]:
    """Return what no fault makes but a person wants to know of a run.

    Parameters
    ----------
    ds
        What `open_dataset` returns, of one run.
    summary
        What `summary` returns of it.

    Returns
    -------
    tuple of Concern
        What concerns all tokens, and then what concerns a group of them and not all.
    """
    source = selected(ds).source
    found: dict[str, list[Concern]] = {}
    for group in sorted(map(str, summary.group.values), key=lambda name: name != ALL):
        concerns = concerns_of(summarized(source, summary, group))
        for code in {concern.code: None for concern in concerns if concern.code not in found}:
            found[code] = [concern for concern in concerns if concern.code == code]
    return tuple(concern for concerns in found.values() for concern in concerns)


def summarized(source: Source, summary: xr.Dataset, group: str) -> Measurements:
    """Return the measurements of a group of a summary's tokens."""
    of = summary.sel(group=group)
    rows = np.searchsorted(source.steps, summary.step.values)
    later = summary.step.values > 0
    updates = _updates(of, source.reader.schema.n_dims)
    of_rows = {name: getattr(updates, name)[later] for name in _BY_STEP}
    name = source.reader.schema.row_name
    n_rows = int(of.is_member.sum())
    whose = f"all {n_rows:,} {name}s" if group == ALL else f"the {n_rows:,} {name}s of {group}"
    grad_norm = _norm(summary.norm_grad) if "norm_grad" in summary else np.full(len(rows), np.nan)
    return Measurements.of(
        source,
        rows[later],
        Updates(**of_rows, looked_at=f"{int(later.sum()):,} steps of {whose}"),
        grad_norm[later],
        f"all {summary.sizes[of.is_member.dims[0]]:,} {name}s",
    )


_BY_STEP = ("share_small", "lost", "size", "std")


def _updates(of: xr.Dataset, n_dims: int) -> Updates:
    """Return what the steps did to a group, from the numbers of its summary."""
    moved, stalled, below, wanted, observed, cosine = (
        of[name].values
        for name in (
            *("share_moved", "share_stalled", "share_below_half_ulp"),
            *("norm_predicted", "norm_observed", "cosine_predicted"),
        )
    )
    n_elements = int(of.is_member.sum()) * n_dims
    share = moved + stalled  # what is not to move is below half a ULP, too, and no update
    product = np.nan_to_num(cosine) * wanted * observed
    squares = (_norm(of.norm_W.where(of.is_member, 0.0)) ** 2) / n_elements
    means = of.centroid.mean(str(of.centroid.dims[-1])).values if n_dims > 1 else of.centroid.values
    std = np.sqrt(np.maximum(squares - means.reshape(len(squares)) ** 2, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return Updates(
            share_small=(below - (1 - share)) / share,
            lost=np.sqrt(np.maximum(wanted**2 + observed**2 - 2 * product, 0)) / wanted,
            size=wanted / np.sqrt(n_elements),
            std=np.concatenate([[np.nan], std[:-1]]),
            looked_at="",
        )


def _norm(norms: xr.DataArray) -> np.ndarray:
    """Return the norm of all rows together, by step, from that of each."""
    total: np.ndarray = np.sqrt(
        (norms.astype(np.float64) ** 2).sum(str(norms.dims[-1]), skipna=False)
    )
    return np.asarray(total)
