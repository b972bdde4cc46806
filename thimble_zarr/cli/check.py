"""`check`: does every recorded row follow from the one before?"""

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thimble_zarr.cli.options import QUIET, STORE, TOKEN_MASK, aligned
from thimble_zarr.cli.scheduling import scheduled, scheduling_options
from thimble_zarr.errors import StoreError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from thimble_zarr.analysis.findings import Finding
    from thimble_zarr.analysis.verdict import Verdict

FOUND = 1
"""Exit code when the check found something."""

EDGE_ROWS = 20
"""Rows shown from each end of a long table, as in the original notebook."""


@click.command()
@STORE
@click.option(
    "--tokens",
    metavar="SUBSET",
    help="all, live, dead, ids such as 17,42, @FILE of ids, or text:TEXT for the token that reads "
    "TEXT.  [default: dead where known, else all]",
)
@click.option("--steps", metavar="A:B", help="First and last step.  [default: every step]")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
    help="A table for people, or every step for machines.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Write to a file, not to stdout.")
@click.option(
    "--extended",
    is_flag=True,
    help="Add columns: shares of elements that stalled and that moved, mean distance moved in ULP, "
    "norm of what the replay leaves.",
)
@click.option(
    "--replay/--no-replay",
    default=True,
    help="Take every step again with torch and compare bits, or check the formula only.  "
    "[default: replay]",
)
@click.option(
    "--device",
    metavar="DEVICE",
    help="Where to replay: cpu, cuda or mps.  [default: where it was recorded, if that is here]",
)
@scheduling_options
@TOKEN_MASK
@QUIET
@click.pass_context
def check(ctx: click.Context, /, store: Path, **options: Any) -> None:
    """Check whether every recorded row in STORE follows from the one before.

    Step by step it compares the observed change of the selected embeddings with what AdamW's
    formula predicts from the recorded states: both norms, the norm of the difference, cosine and
    ratio. Then torch takes every step again, and weights and moments are compared bit by bit; where
    they differ, the cause is looked for and named.
    STORE may be the safetensors file of the original notebook; it is read in place.
    Exit code 0 if the books balance, else 1.
    """
    holds = run_check(store, **options)
    ctx.exit(0 if holds else FOUND)


def run_check(
    store: Path,
    *,
    tokens: str | None = None,
    steps: str | None = None,
    format_: str = "table",
    output: Path | None = None,
    extended: bool = False,
    replay: bool = True,
    device: str | None = None,
    token_mask: Path | None = None,
    quiet: bool = False,
    **scheduling: Any,
) -> bool:
    """Compute, print and judge; return whether the books balance."""
    from thimble_zarr.analysis.accounting import accounting, lazy_variable
    from thimble_zarr.analysis.budget import Needs
    from thimble_zarr.analysis.dataset import dataset_of
    from thimble_zarr.analysis.findings import find_causes
    from thimble_zarr.analysis.selection import select_steps, select_tokens
    from thimble_zarr.analysis.verdict import verdict
    from thimble_zarr.interchange.recording import open_recording

    if device is not None and not replay:
        raise click.UsageError("--device says where to replay, and --no-replay not to")
    if output is not None and not output.absolute().parent.is_dir():
        raise StoreError(f"cannot write {output}: there is no directory {output.parent}")
    ds = dataset_of(open_recording(store, token_mask=token_mask))
    n_all = ds.sizes["token"]
    ds, subset = select_tokens(ds, tokens)
    ds = select_steps(ds, steps)
    needs = Needs.of(lazy_variable(ds), replay=replay)
    with scheduled(needs, replay=replay, quiet=quiet, **scheduling):
        table = accounting(ds, replay=replay, extended=extended, device=device)
    findings = find_causes(ds, table) if replay else []
    found = verdict(table, findings)
    rows = _rows(table, extended=extended)
    if format_ == "csv":
        text = rows.to_csv(index=False)
    elif format_ == "json":
        about = {"store": str(store), "tokens": {"subset": subset, "n": ds.token.size}}
        text = _as_json(about, rows, table, findings, found)
    else:
        parts = [_title(store, ds, subset, n_all), _as_table(rows)]
        parts += [replay_table(table)] if replay else []
        text = "\n\n".join([*parts, _in_words(found, findings)]) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
    if not quiet and (output is not None or format_ == "csv"):
        click.echo(_in_words(found, findings), err=True)
    return found.holds


def _rows(table: "xr.Dataset", *, extended: bool) -> "pd.DataFrame":
    from thimble_zarr.analysis.accounting import COLUMNS, EXTENDED

    names = [*COLUMNS, *(name for name in EXTENDED if extended and name in table)]
    return (
        table[names]
        .drop_dims("recurrence", errors="ignore")
        .to_dataframe()
        .rename_axis("t")
        .reset_index()
    )


def _in_words(found: "Verdict", findings: "Sequence[Finding]") -> str:
    return "\n".join([found.text, *(f"  {f.code}: {f.message}" for f in findings)])


def replay_table(table: "xr.Dataset") -> str:
    """Return the replay for people, a line for each recurrence."""
    reason = table.attrs["not_exact_because"]
    how = f"not to the bit, because {reason}" if reason else "to the bit"
    lines = [("", "elements", "equal", "share", "first differing", "max ULP")]
    for name, found in _replay(table).items():
        total, equal, first = found["total"], found["equal"], found["first"]
        share = math.floor(1e6 * equal / total) / 1e4  # never 100 % of what is not all
        where = "step {step}, token {token}, dim {dim}".format(**first) if first else "none"
        ulp = f"{found['max_ulp']:g}"
        lines.append((name, f"{total:,}", f"{equal:,}", f"{share:g} %", where, ulp))
    return f"Replay on {table.attrs['device']}, {how}\n{aligned(lines)}"


def _replay(table: "xr.Dataset") -> "dict[str, dict[str, Any]]":
    """Return for each recurrence how many elements are equal, and the first that is not."""
    found = {}
    total = int(table.n_elements) * table.sizes["step"]
    for name in table.recurrence.values.tolist():
        of = table.sel(recurrence=name)
        differing = of.isel(step=(of.n_different > 0).values)
        first = None
        if differing.sizes["step"]:
            at = differing.isel(step=0)
            first = {
                "step": int(at.step),
                "token": int(at.first_token),
                "dim": int(at.first_dim),
            }
        found[name] = {
            "total": total,
            "equal": total - int(of.n_different.sum()),
            "max_ulp": float(of.max_ulp.max()),
            "first": first,
        }
    return found


def _title(store: Path, ds: "xr.Dataset", subset: str, n_all: int) -> str:
    return (
        f"Store    {store}: {ds.attrs['dtype']}, {ds.attrs['optimizer']} "
        f"({ds.attrs['implementation']})\n"
        f"Tokens   {subset}: {ds.token.size:,} of {n_all:,}\n"
        f"Steps    {max(1, int(ds.step.min()))} to {int(ds.step.max())}"
    )


def _summary(rows: "pd.DataFrame") -> "pd.DataFrame":
    import numpy as np

    with np.errstate(invalid="ignore"):  # a ratio is infinite where nothing moved
        return rows.drop(columns="t").describe()


def _as_table(rows: "pd.DataFrame") -> str:
    summary = _summary(rows).to_string()
    if len(rows) <= 2 * EDGE_ROWS:
        return f"{rows.to_string(index=False)}\n\nSummary\n{summary}"
    return (
        f"First {EDGE_ROWS} steps\n{rows.head(EDGE_ROWS).to_string(index=False)}\n\n"
        f"Last {EDGE_ROWS} steps\n{rows.tail(EDGE_ROWS).to_string(index=False)}\n\n"
        f"Summary\n{summary}"
    )


def _as_json(
    about: "dict[str, Any]",
    rows: "pd.DataFrame",
    table: "xr.Dataset",
    findings: "Sequence[Finding]",
    found: "Verdict",
) -> str:
    """Return the check as strict JSON: what is not a finite number is null."""
    summary = _summary(rows)
    replay = _replay(table) if "recurrence" in table.dims else None
    for of in (replay or {}).values():
        of["max_ulp"] = of["max_ulp"] if math.isfinite(of["max_ulp"]) else None
    content = about | {
        "steps": [int(rows.t.min()), int(rows.t.max())],
        "rows": [_finite(row) for row in rows.to_dict("records")],
        "summary": {name: _finite(column.to_dict()) for name, column in summary.items()},
        "replay": replay,
        "replay_device": table.attrs.get("device"),
        "not_exact_because": table.attrs.get("not_exact_because"),
        "findings": [finding.to_json() for finding in findings],
        "holds": found.holds,
        "verdict": found.text,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _finite(values: Mapping[Hashable, float]) -> dict[str, float | None]:
    return {str(name): v if math.isfinite(v) else None for name, v in values.items()}
