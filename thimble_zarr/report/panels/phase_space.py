"""What the optimizer keeps of each token: its two estimates against each other."""

from collections.abc import Mapping

import numpy as np

from thimble_zarr.report.downsample import few_steps, sample_note, sampled, token_ids, values_of
from thimble_zarr.report.figure import BLUE, ORANGE, Axis, Figure, Layer, Line, Panel, Points
from thimble_zarr.report.panels.optimizer import label_of, moments
from thimble_zarr.report.run import Run

N_STEPS = 6


def phase_space(run: Run) -> Panel:
    """Return the first moment against the root of the second, of each token at six steps."""
    names, title = moments(run.summary), "Phase space of the optimizer"
    if names is None:
        note = "This optimizer does not divide an estimate by the root of another."
        code = run.code("phase_space")
        return Panel(name="phase_space", title=title, code=code, figures=[], note=note)
    root, first = map(label_of, names)
    x, y = (
        Axis(label=f"{label}, RMS over dims", is_log=True, can_switch=True)
        for label in (root, first)
    )
    tokens, figures = sampled(run), []
    for step in few_steps(run.steps[run.follows], N_STEPS):
        lr = float(run.ds["learning_rate"].sel(step=step))
        layers = _layers(run, names, step, lr, tokens)
        figures.append(Figure(title=f"step {step:,}, lr {lr:.3g}", x=x, y=y, layers=layers))
    note = (
        f"On the dashed line, {first} = ULP {root} / lr, an update is one ULP, the distance to the "
        f"next number of {run.summary.attrs['ulp_dtype']}; on the solid line, half of one: below "
        "it rounding mostly loses the update. The ULP is the median of those at the weights before "
        f"the step, of the {run.row_name}s shown: each has its own. " + sample_note(run)
    )
    return Panel(
        name="phase_space",
        title=f"{title}: {first} against {root} of each {run.row_name}",
        code=run.code("phase_space"),
        figures=[figure for figure in figures if figure.layers],
        note=note.strip(),
        has_same_axes=True,
    )


def _layers(
    run: Run, names: tuple[str, str], step: int, lr: float, tokens: Mapping[str, np.ndarray]
) -> list[Layer]:
    """Return points and line of each group. What is 0 or NaN has no place on these axes."""
    layers: list[Layer] = []
    n_dims, spacings = run.summary.sizes["dim"], _spacings(run, step, tokens)
    root, first = (
        run.summary[name].sel(step=step).values.astype(np.float64) / np.sqrt(n_dims)
        for name in names
    )
    is_shown = (root > 0) & (first > 0) & np.isfinite(root) & np.isfinite(first)
    for group, of in tokens.items():
        at = of[is_shown[of]]
        if len(at) == 0:
            continue
        x, y, ids = root[at], first[at], token_ids(run, at)
        label = run.row_name
        layers.append(Points(label=label, group=group, color=BLUE, x=x, y=y, tokens=ids))
        if lr > 0 and np.isfinite(spacings[group]):
            ends = np.array([x.min(), x.max()])
            layers += [
                Line(
                    label=f"{name} ULP (median)",
                    group=group,
                    color=ORANGE,
                    x=ends,
                    y=n_ulps * spacings[group] * ends / lr,
                    is_dashed=n_ulps == 1,
                )
                for name, n_ulps in (("1/2", 0.5), ("1", 1))
            ]
    return layers


def _spacings(run: Run, step: int, tokens: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the median ULP of each group's weights before a step; NaN if none are finite."""
    spacings = {}
    for group, ulps in values_of(run.ulp, step - 1, tokens).items():
        finite = ulps[np.isfinite(ulps)]
        spacings[group] = float(np.median(finite)) if len(finite) else np.nan
    return spacings
