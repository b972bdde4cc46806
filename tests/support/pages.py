"""Panels made by hand: every kind of layer, in three groups, with what makes drawing hard."""

import html
import json
import re

import numpy as np

from thimble_zarr.report.figure import (
    Axis,
    Band,
    Bars,
    Figure,
    Image,
    Line,
    Panel,
    Points,
    Rule,
    Stack,
)

GROUPS = ("dead", "live", "all")

N_POINTS = 7

X = np.arange(N_POINTS) * 10

Y = np.array([3.0, np.nan, np.inf, 0.0, -1.0, 1e-30, 2.0])
"""What lines may be made of."""

LOG = Axis(label="size", is_log=True, can_switch=True)

PIXELS = np.array([[np.nan, 0.0, 1e-3], [1.0, 10.0, np.inf]], np.float32)


def hard_panels() -> list[Panel]:
    """Return panels with every kind of layer, the numbers of each group its own."""
    lines, areas, bars, images, points = [], [], [], [], []
    for k, group in enumerate(GROUPS, 1):
        lines += [
            Band(label="quartiles", group=group, x=X, low=np.zeros(N_POINTS), high=k + X * 1.0),
            Line(label="median", group=group, x=X, y=k * Y, low=k * Y / 2, high=k * Y * 2),
        ]
        areas.append(Stack(group=group, x=X, heights={"early": X * k, "late": X + k}))
        bars.append(Bars(group=group, edges=np.arange(5) * k, heights=np.array([0, k, 2, 3])))
        images.append(
            Image(group=group, values=PIXELS * k, x=(0, 60), y=(0, 2), unit="ULP", is_log=True)
        )
        points.append(
            Points(label="token", group=group, x=X, y=Y * k, tokens=np.arange(N_POINTS) + k)
        )
    rate = Line(label="rate", x=X, y=np.full(N_POINTS, 1e-3), on_right=True)
    figures = {
        "size": [
            Figure(title="Left", y=LOG, right=Axis(label="rate"), layers=[*lines, rate]),
            Figure(title="Right", y=LOG, layers=[*lines, Rule(label="one ULP", y=1.0)]),
        ],
        "regimes": [Figure(y=Axis(label="share"), layers=areas)],
        "last": [
            Figure(x=Axis(label="last step"), y=Axis(label="n", can_switch=True), layers=bars)
        ],
        "picture": [Figure(y=Axis(label="token"), layers=images)],
        "space": [Figure(x=LOG, y=LOG, layers=[*points, Rule(x=2.0)])] * 2,
        "nothing": [],
    }
    return [
        Panel(
            name=name,
            title=f"Panel of {name}",
            code=f"thimble_zarr.plot.{name}('run.zarr')",
            figures=of,
            note="Why it is empty." if not of else "",
            has_same_axes=name == "space",
        )
        for name, of in figures.items()
    ]


def document_of(page: str) -> list[dict]:
    """Return every model that a page defines, as Bokeh's JSON has it."""
    (text,) = re.findall(r'<script type="application/json" id="[^"]*">(.*?)</script>', page, re.S)
    found: list[dict] = []

    def walk(of: object) -> None:
        if isinstance(of, dict):
            if of.get("type") == "object" and "id" in of:
                found.append(of)
            for value in of.values():
                walk(value)
        elif isinstance(of, list):
            for value in of:
                walk(value)

    walk(json.loads(html.unescape(text)))
    return found
