"""The health of a run that has a summary, which knows of all of its steps and tokens."""

import numpy as np
import xarray as xr

from thimble_zarr.analysis.audit.accounting import selected
from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.analysis.health.condition import Concern
from thimble_zarr.analysis.health.conditions import concerns_of
from thimble_zarr.analysis.health.measurements import Measurements, Updates, first_update_row

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
    groups = sorted(map(str, summary.group.values), key=lambda name: name != ALL)
    found: dict[tuple[str, str], Concern] = {}
    for measurements in summarized(source, summary, groups):
        for concern in concerns_of(measurements):
            found.setdefault((concern.code, str(concern.evidence.get("variable"))), concern)
    return tuple(found.values())


def summarized(source: Source, summary: xr.Dataset, groups: list[str]) -> list[Measurements]:
    """Return the measurements of groups of a summary's tokens, at its steps."""
    of_groups, steps = _in_memory(source, summary), summary.step.values
    rows = np.searchsorted(source.steps, steps[steps > 0])
    names = f"{source.reader.schema.row_name}s"
    grad_norm = np.full(len(rows), np.nan)
    if "norm_grad" in summary:
        squares = summary.norm_grad.astype(np.float64) ** 2
        grad_norm = np.sqrt(squares.sum("token", skipna=False).values)[steps > 0]
    of_grad = f"all {summary.sizes['token']:,} {names}"
    found = []
    for group in groups:
        of = of_groups.sel(group=group)
        n_rows = f"{int(of.is_member.sum()):,}"
        whose = f"all {n_rows} {names}" if group == ALL else f"the {n_rows} {names} of {group}"
        updates = _updates(source, of, f"{len(rows):,} steps of {whose}")
        found.append(Measurements.of(source, rows, updates, grad_norm, of_grad))
    return found


_OF_GROUPS = (
    *("is_member", "centroid", "share_moved", "share_stalled", "share_below_half_ulp"),
    *("norm_predicted", "norm_observed", "cosine_predicted"),
)


def _in_memory(source: Source, summary: xr.Dataset) -> xr.Dataset:
    """Return what is small of a summary, and as `norm_before` `norm_W` before the first update."""
    small, steps = summary[[name for name in _OF_GROUPS if name in summary]], summary.step.values
    first = source.steps[first_update_row(source)]
    if {first - 1, first} <= {*steps.tolist()}:
        small = small.assign(norm_before=summary.norm_W.sel(step=first - 1, drop=True))
    return small.compute()


def _updates(source: Source, summary: xr.Dataset, looked_at: str) -> Updates:
    """Return what the steps did to a group, from the numbers of its summary."""
    of = summary.isel(step=summary.step.values > 0)
    std, nothing = _std(source, summary), np.full(of.sizes["step"], np.nan)
    if "share_stalled" not in of:  # no formula, or what it needs was not recorded
        return Updates(
            share_small=nothing, lost=nothing, size=nothing, std=std, looked_at=looked_at
        )
    wanted, observed = of.norm_predicted.values, of.norm_observed.values
    product = np.nan_to_num(of.cosine_predicted.values) * wanted * observed
    # What need not move is below half a ULP, too, and no update.
    share = (of.share_moved + of.share_stalled).values
    n_elements = int(of.is_member.sum()) * source.reader.schema.n_dims
    with np.errstate(divide="ignore", invalid="ignore"):
        return Updates(
            share_small=(of.share_below_half_ulp.values - (1 - share)) / share,
            lost=np.sqrt(np.maximum(wanted**2 + observed**2 - 2 * product, 0)) / wanted,
            size=wanted / np.sqrt(n_elements),
            std=std,
            looked_at=looked_at,
        )


def _std(source: Source, of: xr.Dataset) -> np.ndarray:
    """Return the standard deviation of weights before the first update; NaN at other steps."""
    steps = of.step.values[of.step.values > 0]
    std = np.full(len(steps), np.nan)
    if "norm_before" in of:
        first = source.steps[first_update_row(source)]
        norms = of.norm_before.values[of.is_member.values].astype(np.float64)
        square = np.mean(norms**2) / source.reader.schema.n_dims
        mean = of.centroid.sel(step=first - 1).values.mean()
        std[steps == first] = np.sqrt(np.maximum(square - mean**2, 0))
    return std
