"""What a person asks of a run first: how large, how trained, frozen when, moved how far."""

import json
from collections.abc import Mapping

import numpy as np
import xarray as xr

from thimble_zarr.format.layout import human_bytes
from thimble_zarr.format.schema import Schema
from thimble_zarr.report.panels.regimes import Exits
from thimble_zarr.report.run import Run

Facts = Mapping[str, str]
"""What is told of a run, by its name."""


def schema_of(run: Run) -> Schema:
    """Return all that is known of a run since its recording began."""
    return Schema.from_attribute(json.loads(run.ds.attrs["thimble"]))


def facts(run: Run) -> Facts:
    """Return what was recorded, how it was trained, and its largest step."""
    schema, steps = schema_of(run), run.steps
    shape = " x ".join(f"{length:,}" for length in schema.shape) or "scalar"
    whole = f" of {schema.whole_tokens:,} {schema.row_name}s" if schema.whole_tokens else ""
    n_bytes = len(run.ds.step) * schema.row_bytes
    recorded = f", by schedule {schedule}" if (schedule := schema.schedule) else ""
    every = {
        "parameter": f"{schema.parameter or 'unnamed'}, {shape}{whole}, on {schema.device}",
        "steps": f"{steps[0]:,} to {steps[-1]:,}, {len(steps):,} rows{recorded}",
        "tokens": _tokens(run),
        "dtypes": ", ".join(f"{name} {native}" for name, native in schema.dtypes.items()),
        "size": f"{human_bytes(n_bytes)} uncompressed",
        "optimizer": f"{schema.optimizer.name}, {schema.optimizer.implementation}",
        "hyper-parameters": _hyper_parameters(run.ds, schema),
        "largest step": largest_step(run),
        "loss": _loss(run.ds),
        "settings": _settings(schema),
        "recorded": ", ".join(
            [schema.created, *(f"{name} {version}" for name, version in schema.software.items())]
        ),
    }
    return {name: text for name, text in every.items() if text}


def _tokens(run: Run) -> str:
    """Return how many tokens are in each group."""
    sizes = [f"{int(mask.sum()):,} {name}" for name, mask in run.members.items()]
    return ", ".join(sizes) if run.row_name == "token" else ""


def _hyper_parameters(ds: xr.Dataset, schema: Schema) -> str:
    """Return the numbers that the optimizer's steps used: one, or the first to the last."""
    told = []
    for name in schema.optimizer.scalars:
        values = ds[name].values if name in ds else np.empty(0)
        values = values[~np.isnan(values)]
        if values.size:
            is_constant = (values == values[0]).all()
            ends = values[:1] if is_constant else (values[0], values[-1])
            told.append(f"{name.replace('_', ' ')} {' to '.join(f'{end:.6g}' for end in ends)}")
    return ", ".join(told)


def _loss(ds: xr.Dataset) -> str:
    """Return the first and the last loss; nothing where none was logged."""
    if "loss" not in ds:
        return ""
    values = ds["loss"].values
    known = values[~np.isnan(values)]
    return f"{known[0]:.4g} at first, {known[-1]:.4g} at last" if known.size else ""


def _settings(schema: Schema) -> str:
    """Return the settings of the run, seeds first, that were kept and not told already."""
    config = schema.attrs.get("config", schema.attrs)
    if not isinstance(config, Mapping):
        return ""
    simple = {
        str(name): value
        for name, value in config.items()
        if isinstance(value, int | float | str) and not isinstance(value, bool)
        if name not in schema.optimizer.scalars
    }
    first = [name for name in simple if "seed" in name]
    names = [*first, *(name for name in simple if name not in first)]
    return ", ".join(f"{name.replace('_', ' ')} {simple[name]}" for name in names[:_MOST_SETTINGS])


_MOST_SETTINGS = 16


def largest_step(run: Run) -> str:
    """Return which row moved how far when, the farthest of all; nothing of a run without a step."""
    most = run.summary["norm_delta_W_quantiles"].sel(quantile=1.0).max("group").values
    if np.isnan(most).all():
        return ""
    row = int(np.nanargmax(np.where(np.isnan(most), -np.inf, most)))
    of_step = run.summary[["norm_delta_W", "l2_ulp", "max_ulp"]].isel(step=row).load()
    sizes = of_step["norm_delta_W"].values
    token = int(np.nanargmax(np.where(np.isnan(sizes), -np.inf, sizes)))
    at = of_step.isel(token=token)
    return (
        f"step {run.steps[row]:,}, {_name(run, token)}: |delta W| {float(at.norm_delta_W):.4g}, "
        f"{float(at.l2_ulp):,.4g} ULP; its farthest dim {float(at.max_ulp):,.4g} ULP"
    )


def _name(run: Run, position: int) -> str:
    """Return how a row is called: its id, and the token's text where that is known."""
    row = run.summary.isel(token=position)
    number = int(row["token"]) if "token" in row.coords else position
    text = f" {json.dumps(str(row['text'].values), ensure_ascii=False)}" if "text" in row else ""
    return f"{run.row_name} {number}{text}"


def freezing(run: Run) -> list[tuple[str, ...]]:
    """Return when each group froze, and how much of it never did: a table, its columns first.

    It has no other rows of a run without a step.
    """
    exits = Exits.of(run)
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for name, mask in run.members.items() if run.follows.any() else ():
        frozen = np.sort(exits.late[mask & exits.is_frozen])
        ends = ["-"] * 4
        if frozen.size:
            at = (mask.sum() - 1) // 2
            steps = (frozen[0], np.median(frozen), frozen[-1])
            half = f"{frozen[at]:,}" if at < frozen.size else "-"
            ends = [*(f"{step:,.0f}" for step in steps), half]
        n_moving = (mask & exits.is_finite & exits.is_moving).sum()
        n_broken = (mask & ~exits.is_finite).sum()
        rows.append(
            (name, f"{mask.sum():,}", f"{frozen.size:,}", *ends, f"{n_moving:,}", f"{n_broken:,}")
        )
    if exits.is_finite.all():
        rows = [row[:-1] for row in rows]
    return rows


_COLUMNS = (
    *("group", "rows", "frozen", "first froze at step", "median of them", "last"),
    *("half of all were frozen by", "still moving at the end", "not finite"),
)


def median_freeze_steps(run: Run) -> dict[str, float]:
    """Return when the median frozen row of each group froze, of those of which a tenth did."""
    exits, steps = Exits.of(run), dict[str, float]()
    for group, mask in run.members.items():
        frozen = exits.late[mask & exits.is_frozen & (exits.late > 0)]
        if frozen.size >= max(1, 0.1 * mask.sum()):
            steps[group] = float(np.median(frozen))
    return steps
