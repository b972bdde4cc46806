"""What a person asks of a run first: how large, how trained, at rest since, moved how far."""

import json
from collections.abc import Mapping

import numpy as np
import xarray as xr

from thimble_zarr.format.layout import human_bytes
from thimble_zarr.format.schema import Schema
from thimble_zarr.report.downsample import values_of
from thimble_zarr.report.panels.regimes import Exits
from thimble_zarr.report.rests import Rests
from thimble_zarr.report.run import Run

Facts = dict[str, str]
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
        "largest step, by |delta W|": largest_step(run, "norm_delta_W"),
        "largest step, in ULP": largest_step(run, "l2_ulp"),
        "loss": _loss(run.ds),
        "lines": _lines(run),
        "settings": _settings(schema),
        "recorded": ", ".join(
            [schema.created, *(f"{name} {version}" for name, version in schema.software.items())]
        ),
    }
    return {name: text for name, text in every.items() if text}


def _tokens(run: Run) -> str:
    """Return how many tokens are in each group."""
    told = _LABELS if "dead" in run.summary.coords else {}
    sizes = [
        f"{int(mask.sum()):,} {name}{told.get(name, '')}" for name, mask in run.members.items()
    ]
    return ", ".join(sizes) if run.row_name == "token" else ""


_LABELS = {"dead": " (never in the training text)", "live": " (in it)"}
"""What labels of tokens say of them."""


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


def _lines(run: Run) -> str:
    """Return what a point of a line is, where it is of several steps."""
    n_at_once = -(-len(run.steps) // run.n_columns)
    if n_at_once == 1:
        return ""
    return (
        f"each point is the median of up to {n_at_once} steps, and the pale area around a line, "
        "or what is in brackets, their least and greatest"
    )


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


def largest_step(run: Run, by: str) -> str:
    """Return which row moved how far when, the farthest of all by a variable of the summary.

    It is empty of a run without a step.
    """
    most = run.summary[f"{by}_quantiles"].sel(quantile=1.0).max("group").values
    if np.isnan(most).all():
        return ""
    row = int(np.nanargmax(most))
    step = int(run.steps[row])
    of_step = run.summary[["norm_delta_W", "l2_ulp"]].isel(step=row).load()
    token = int(np.nanargmax(of_step[by].values))
    sizes = of_step.isel(token=token)
    at = {"": np.array([token])}
    before, after = (values_of(run.ds["W"], of, at)[""][0] for of in (step - 1, step))
    ulps = np.abs(after - before) / values_of(run.ulp, step - 1, at)[""][0]
    dim = int(np.argmax(ulps))
    return (
        f"step {step:,}, {_name(run, token)}: |delta W| {float(sizes.norm_delta_W):.4g}, "
        f"{float(sizes.l2_ulp):,.4g} ULP; its farthest dim by {ulps[dim]:,.4g} ULP, "
        f"from {before[dim]:.4g} to {after[dim]:.4g}"
    )


def _name(run: Run, position: int) -> str:
    """Return how a row is called: its id, and the token's text where that is known."""
    row = run.summary.isel(token=position)
    number = int(row["token"]) if "token" in row.coords else position
    text = f" {json.dumps(str(row['text'].values), ensure_ascii=False)}" if "text" in row else ""
    return f"{run.row_name} {number}{text}"


def resting(run: Run) -> tuple[list[tuple[str, ...]], str]:
    """Return since when each group is at rest, and how far that can be relied on.

    A table, its columns first, and how to read it. It has no rows of a run without a step.
    """
    exits, rows, longest = Exits.of(run), list[tuple[str, ...]](), dict[str, int]()
    if not exits.last:
        return [RESTING_COLUMNS], ""
    rests, has_lost = Rests.of(run, exits), not exits.is_finite.all()
    for name, mask in run.members.items():
        at_rest, ends = mask & exits.is_frozen, ["-"] * 4
        if at_rest.any():
            since, lengths = exits.late[at_rest], rests.at_end[at_rest]
            numbers = (since.min(), np.median(since), since.max(), np.median(lengths))
            ends = [f"{number:,.0f}" for number in numbers]
        longest[name] = int(rests.ended[mask].max(initial=0))
        counts = (mask, at_rest, mask & exits.is_moving & exits.is_finite)
        n_rows, n_at_rest, n_moving = (f"{int(of.sum()):,}" for of in counts)
        lost = [f"{int((mask & ~exits.is_finite).sum()):,}"] if has_lost else []
        half_by = exits.half_by(mask)
        since_when = (*ends[:3], "-" if half_by is None else f"{half_by:,.0f}")
        rests_of = (ends[3], f"{longest[name]:,}")
        rows.append((name, n_rows, n_at_rest, *since_when, *rests_of, n_moving, *lost))
    columns = RESTING_COLUMNS + ("not finite",) * has_lost
    return [columns, *rows], _caption(run.row_name, longest)


RESTING_COLUMNS = (
    *("group", "rows", "at rest at the end", "their last move at step: first", "median", "last"),
    *("half of all made theirs by", "steps of rest at the end, median"),
    *("longest rest that ended, steps", "still moving at the end"),
)


def _caption(row_name: str, longest: Mapping[str, int]) -> str:
    """Return how to read that table: what it cannot know."""
    rested = [f"{length:,} steps ({name})" for name, length in longest.items() if length]
    told = (
        f"A {row_name} is at rest from the step after its last move to the end of the recording. "
        f"Some rested for up to {', '.join(rested)} before, and moved again: "
        "a shorter rest may end."
    )
    return told if rested else told.partition(" Some")[0]


def median_freeze_steps(run: Run) -> dict[str, float]:
    """Return when the median frozen row of each group froze, of those of which a tenth did."""
    exits, steps = Exits.of(run), dict[str, float]()
    for group, mask in run.members.items():
        frozen = exits.late[mask & exits.is_frozen & (exits.late > 0)]
        if frozen.size >= max(1, 0.1 * mask.sum()):
            steps[group] = float(np.median(frozen))
    return steps
