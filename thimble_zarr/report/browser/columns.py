"""The numbers of a figure as tables that go to the browser, each once and as small as they may be.

Layers of one group that have the same x share a table, so that x is sent once, and one tooltip
shows them all. The column of layer 3 that holds its y is `y3`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thimble_zarr.report.figure import Band, Bars, Figure, Image, Layer, Line, Points, Rule, Stack

BLANK = 255
"""A pixel without a number. The others are 1 to 254, from the least to the greatest of a figure."""

STILL = 0
"""A pixel that is 0, where colors are by the logarithm."""


Column = np.ndarray | list[np.ndarray]
"""Numbers, or pictures."""


@dataclass(frozen=True)
class Table:
    """Columns of one length, and the positions of the layers that are drawn from them."""

    columns: Mapping[str, Column]
    layers: Sequence[int]


@dataclass(frozen=True)
class ColorScale:
    """What the pixels of a figure stand for: 1 is `low`, and 254 `high`."""

    low: float
    high: float
    is_log: bool


def tables_of(figure: Figure) -> list[Table]:
    """Return the tables of a figure."""
    together: dict[object, list[int]] = {}
    for i, layer in enumerate(figure.layers):
        key: object = i
        if isinstance(layer, Line | Band | Stack):
            key = (layer.group, np.asarray(layer.x).tobytes())
        together.setdefault(key, []).append(i)
    least, colors = least_positive(figure.layers), color_scale(figure.layers)
    tables = []
    for of in together.values():
        columns: dict[str, Column] = {}
        for i in of:
            columns |= _columns(i, figure.layers[i], least, colors)
        tables.append(Table(columns, of))
    return tables


def least_positive(layers: Sequence[Layer]) -> float:
    """Return the least positive number that is drawn: a logarithmic axis has areas end there."""
    numbers: list[np.ndarray] = []
    for layer in layers:
        match layer:
            case Line():
                numbers += [of for of in (layer.y, layer.low) if of is not None]
            case Band():
                numbers += [layer.low, layer.high]
            case Bars():
                numbers.append(layer.heights)
    every = np.concatenate([np.empty(0), *numbers])
    known = every[np.isfinite(every) & (every > 0)]
    return float(known.min()) if known.size else 1.0


def color_scale(layers: Sequence[Layer]) -> ColorScale:
    """Return what the colors of all images of a figure stand for."""
    images = [layer for layer in layers if isinstance(layer, Image)]
    is_log = any(image.is_log for image in images)
    every = np.concatenate([np.empty(0), *(image.values.ravel() for image in images)])
    known = every[np.isfinite(every) & ((every > 0) | (not is_log))]
    low, high = (float(known.min()), float(known.max())) if known.size else (1.0, 1.0)
    return ColorScale(low, high if high > low else low * 2 if is_log else low + 1, is_log)


def pixels(values: np.ndarray, colors: ColorScale) -> np.ndarray:
    """Return numbers as one byte each; negative ones are blank on a logarithmic scale."""
    ends, shown = np.array([colors.low, colors.high]), np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.log(ends) if colors.is_log else ends
        shown = np.log(np.where(shown > 0, shown, np.nan)) if colors.is_log else shown
        share = np.clip((shown - low) / (high - low), 0, 1)
    is_blank = np.isnan(share)
    found = np.where(is_blank, BLANK, 1 + np.round(253 * np.where(is_blank, 0, share)))
    return np.where(colors.is_log & (np.asarray(values) == 0), STILL, found).astype(np.uint8)


def _columns(i: int, layer: Layer, least: float, colors: ColorScale) -> dict[str, Column]:
    """Return the columns of layer `i`."""
    found: dict[str, np.ndarray | None] = {}
    match layer:
        case Line():
            found = {"x": layer.x, f"y{i}": layer.y, f"low{i}": layer.low, f"high{i}": layer.high}
        case Band():
            found = {"x": layer.x, f"low{i}": layer.low, f"high{i}": layer.high}
        case Stack():
            found = {"x": layer.x, f"edge{i}_0": np.zeros(len(layer.x))}
            edge = found[f"edge{i}_0"]
            for k, height in enumerate(layer.heights.values()):
                edge = edge + height
                found |= {f"height{i}_{k}": height, f"edge{i}_{k + 1}": edge}
        case Bars():
            found = {"left": layer.edges[:-1], "right": layer.edges[1:], f"y{i}": layer.heights}
            found[f"floor{i}"] = np.full(len(layer.heights), least / 2)
            found[f"top{i}"] = np.maximum(layer.heights, least / 2)
        case Points():
            found = {"x": layer.x, f"y{i}": layer.y, "token": layer.tokens}
        case Rule():
            found = {"at": np.array([layer.x if layer.x is not None else layer.y], np.float64)}
        case Image():
            return _image_columns(layer, colors)
        case _:
            raise TypeError(f"a figure has no layer of the kind {type(layer).__name__}")
    low, high = found.get(f"low{i}"), found.get(f"high{i}")
    if low is not None and high is not None and not (low >= least).all():
        has_place = np.where(low > 0, low, high)  # an area from 0 on has no height
        found[f"floor{i}"] = np.where(high > 0, has_place, np.nan)
    return {name: _small(values) for name, values in found.items() if values is not None}


def _small(values: np.ndarray) -> np.ndarray:
    """Return numbers in few bits, which compress: whole numbers as they are, others rounded."""
    values = np.asarray(values)
    if values.dtype.kind in "iu":
        return values.astype(np.int32)
    with np.errstate(over="ignore"):
        small = values.astype(np.float32)
    if (values == np.trunc(values)).all() and (np.abs(values) < 2**24).all():
        return small
    mantissas, exponents = np.frexp(small)
    rounded: np.ndarray = np.ldexp(np.round(mantissas * 2**_BITS) / 2**_BITS, exponents)
    return rounded


_BITS = 16
"""Of a mantissa: a relative error of 2e-5 at most, of which four digits do not tell."""


def _image_columns(image: Image, colors: ColorScale) -> dict[str, Column]:
    """Return an image as a table of one row; its numbers are pictures."""
    (left, right), (bottom, top) = image.x, image.y
    place = {"x": left, "y": bottom, "width": right - left, "height": top - bottom}
    shown = {"value": image.values, "low": image.low, "high": image.high}
    return {
        **({"tokens": [image.tokens.astype(np.int32)]} if image.tokens is not None else {}),
        **{name: np.array([value], np.float64) for name, value in place.items()},
        **{name: [pixels(values, colors)] for name, values in shown.items() if values is not None},
    }
