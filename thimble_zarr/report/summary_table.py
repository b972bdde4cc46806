"""A summary as a short table: what each group of tokens did, as people and machines read it."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from thimble_zarr.format.documents import finite
from thimble_zarr.report.text import aligned

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, kw_only=True)
class LargestStep:
    """The largest step of a token: its size, which token's it was, and when."""

    size: float
    token: int
    step: int


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """What a group of tokens did.

    Attributes
    ----------
    group, n_tokens
        Its name and size.
    first_freeze_step, median_freeze_step, last_freeze_step
        The steps after which the first token, half of all, and the last of those that froze did not
        move any more; None where none froze, or less than half.
    n_moving
        Tokens that moved at the last step, and so never froze.
    n_early, n_midlife, n_late, n_frozen
        Tokens in each regime at the last step.
    largest, largest_ulp
        The largest step, in weights and, as L2, in ULP; None where nothing is known of any.
    centroid_drift
        Distance between the group's first and last centroid.
    share_moved_first, share_moved_last
        Share of weights that moved at the first and last step; None where that is not known.
    n_identical, largest_identical
        Tokens at the end whose weights are those of another, and the most that are alike.
    """

    group: str
    n_tokens: int
    first_freeze_step: int | None
    median_freeze_step: int | None
    last_freeze_step: int | None
    n_moving: int
    n_early: int
    n_midlife: int
    n_late: int
    n_frozen: int
    largest: LargestStep | None
    largest_ulp: LargestStep | None
    centroid_drift: float
    share_moved_first: float | None
    share_moved_last: float | None
    n_identical: int
    largest_identical: int

    @classmethod
    def of(cls, summary: "xr.Dataset", group: str) -> "GroupSummary":
        """Sum up one group of a summary. Of the numbers of tokens it reads two steps at most."""
        at, steps = summary.sel(group=group), summary.step.values
        tokens = np.flatnonzero(at.is_member.values)
        last = {
            name: at[name].values[tokens]
            for name in ("freeze_step", "last_early", "last_midlife", "last_late")
        }
        end = int(steps[-1])
        frozen = np.sort(last["freeze_step"][last["freeze_step"] < end])
        n_tokens, n_frozen = len(tokens), len(frozen)
        half = (n_tokens + 1) // 2
        is_early = last["last_early"] == end
        is_midlife = ~is_early & (last["last_midlife"] == end)
        centroid, moved = at.centroid.values, at.share_moved.values
        known = moved[~np.isnan(moved)]
        return cls(
            group=group,
            n_tokens=n_tokens,
            first_freeze_step=int(frozen[0]) if n_frozen else None,
            median_freeze_step=int(frozen[half - 1]) if n_frozen >= half else None,
            last_freeze_step=int(frozen[-1]) if n_frozen else None,
            n_moving=n_tokens - n_frozen,
            n_early=int(is_early.sum()),
            n_midlife=int(is_midlife.sum()),
            n_late=n_tokens - n_frozen - int(is_early.sum() + is_midlife.sum()),
            n_frozen=n_frozen,
            largest=_largest(at, "norm_delta_W", tokens),
            largest_ulp=_largest(at, "l2_ulp", tokens),
            centroid_drift=float(np.linalg.norm(centroid[-1] - centroid[0])),
            share_moved_first=float(known[0]) if len(known) else None,
            share_moved_last=float(known[-1]) if len(known) else None,
            n_identical=int(at.n_identical[-1]),
            largest_identical=int(at.largest_identical[-1]),
        )


def _largest(at: "xr.Dataset", name: str, tokens: np.ndarray) -> LargestStep | None:
    of_step = at[f"{name}_quantiles"].sel(quantile=1.0).values
    if np.isnan(of_step).all():
        return None
    row = int(np.nanargmax(of_step))
    values = at[name][row].values[tokens]
    token = int(at.token.values[tokens[np.nanargmax(values)]])
    return LargestStep(size=float(np.nanmax(values)), token=token, step=int(at.step[row]))


def group_summaries(summary: "xr.Dataset") -> list[GroupSummary]:
    """Sum up each group of a summary."""
    return [GroupSummary.of(summary, str(group)) for group in summary.group.values]


def as_text(store: str, summaries: Sequence["xr.Dataset"]) -> str:
    """Return what people read: for each parameter a column a group, and where its summary lies."""
    return "\n\n".join(_text(store, summary) for summary in summaries) + "\n"


def _text(store: str, summary: "xr.Dataset") -> str:
    groups = group_summaries(summary)
    texts = dict(zip(summary.token.values.tolist(), _texts(summary), strict=True))
    rows = [("", *(of.group for of in groups))]
    rows += [(words, *(cell(of) for of in groups)) for words, cell in _ROWS.items()]
    unit = f"{summary.attrs['ulp_dtype']} ULP"
    for words, name in (("largest step", "largest"), (f"  in {unit} (L2)", "largest_ulp")):
        found = [getattr(of, name) for of in groups]
        rows.append((words, *("-" if of is None else f"{of.size:.4g}" for of in found)))
        rows.append(("  at step", *("-" if of is None else f"{of.step:,}" for of in found)))
        rows.append(("  token", *("-" if of is None else texts[of.token] for of in found)))
    steps = summary.step.values
    name = summary.attrs.get("parameter") or "the parameter"
    head = f"{store}: {name}, steps {steps[0]:,} to {steps[-1]:,}"
    return "\n".join([head, "", aligned(rows), "", f"Summary  {_place(summary)}"])


def _texts(summary: "xr.Dataset") -> list[str]:
    tokens = summary.token.values.tolist()
    if "text" not in summary.coords:
        return [str(token) for token in tokens]
    shown = zip(tokens, summary.text.values.tolist(), strict=True)
    return [f"{token} {text!r}" for token, text in shown]


def _step(step: int | None) -> str:
    return "-" if step is None else f"{step:,}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


_ROWS: Mapping[str, Callable[[GroupSummary], str]] = {
    "tokens": lambda of: f"{of.n_tokens:,}",
    "first froze after step": lambda of: _step(of.first_freeze_step),
    "half were frozen after": lambda of: _step(of.median_freeze_step),
    "last froze after": lambda of: _step(of.last_freeze_step),
    "moved at the last step": lambda of: f"{of.n_moving:,}",
    "  early (L2 > sqrt(D) ULP)": lambda of: f"{of.n_early:,}",
    "  midlife (over 1 ULP)": lambda of: f"{of.n_midlife:,}",
    "  late (1 ULP at most)": lambda of: f"{of.n_late:,}",
    "frozen at the end": lambda of: f"{of.n_frozen:,}",
    "weights moved, first step": lambda of: _share(of.share_moved_first),
    "weights moved, last step": lambda of: _share(of.share_moved_last),
    "centroid drifted by": lambda of: f"{of.centroid_drift:.4g}",
    "same weights as another": lambda of: f"{of.n_identical:,}",
}


def _place(summary: "xr.Dataset") -> str:
    return str(summary.encoding.get("source", "not kept"))


def as_json(store: str, summaries: Sequence["xr.Dataset"]) -> str:
    """Return strict JSON: an object with a list of parameters, each with its groups."""
    parameters = [
        {
            "parameter": summary.attrs.get("parameter") or None,
            "summary": _place(summary),
            "steps": [int(summary.step[0]), int(summary.step[-1])],
            "ulp_dtype": summary.attrs["ulp_dtype"],
            "groups": [finite(asdict(of)) for of in group_summaries(summary)],
        }
        for summary in summaries
    ]
    return json.dumps({"store": store, "parameters": parameters}, indent=1, allow_nan=False) + "\n"


def as_csv(store: str, summaries: Sequence["xr.Dataset"]) -> str:
    """Return a line for each group of each parameter."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in fields(GroupSummary)]
    columns = [
        *(name for name in names if not name.startswith("largest")),
        "largest_identical",
        *(f"{name}_{part}" for name in _LARGEST for part in ("size", "token", "step")),
    ]
    writer.writerow(["store", "parameter", *dict.fromkeys(columns)])
    for summary in summaries:
        for of in group_summaries(summary):
            cells = asdict(of)
            for name in _LARGEST:
                for part, value in (cells[name] or {}).items():
                    cells[f"{name}_{part}"] = value
            row = [cells.get(name) for name in dict.fromkeys(columns)]
            writer.writerow([store, summary.attrs.get("parameter"), *row])
    return out.getvalue()


_LARGEST = ("largest", "largest_ulp")
