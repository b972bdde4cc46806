"""`check`: does AdamW's formula explain the recorded weight changes?"""

import contextlib
import json
import math
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thimble_zarr.cli.options import QUIET, STORE, TOKEN_MASK
from thimble_zarr.errors import StoreError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

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
@TOKEN_MASK
@QUIET
@click.pass_context
def check(
    ctx: click.Context,
    store: Path,
    *,
    tokens: str | None,
    steps: str | None,
    format_: str,
    output: Path | None,
    token_mask: Path | None,
    quiet: bool,
) -> None:
    """Check whether AdamW's formula explains the weight changes in STORE.

    Step by step it compares the observed change of the selected embeddings with what the formula
    predicts from the recorded states: both norms, the norm of the difference, cosine and ratio.
    STORE may be the safetensors file of the original notebook; it is read in place.
    Exit code 0 if every residual is within what rounding can explain, else 1.
    """
    holds = run_check(
        store,
        tokens=tokens,
        steps=steps,
        format_=format_,
        output=output,
        token_mask=token_mask,
        quiet=quiet,
    )
    ctx.exit(0 if holds else FOUND)


def run_check(
    store: Path,
    *,
    tokens: str | None = None,
    steps: str | None = None,
    format_: str = "table",
    output: Path | None = None,
    token_mask: Path | None = None,
    quiet: bool = False,
) -> bool:
    """Compute, print and judge; return whether the formula holds."""
    from thimble_zarr.analysis.accounting import COLUMNS, accounting
    from thimble_zarr.analysis.dataset import dataset_of
    from thimble_zarr.analysis.selection import select_steps, select_tokens
    from thimble_zarr.analysis.verdict import verdict
    from thimble_zarr.interchange.recording import open_recording

    if output is not None and not output.absolute().parent.is_dir():
        raise StoreError(f"cannot write {output}: there is no directory {output.parent}")
    ds = dataset_of(open_recording(store, token_mask=token_mask))
    n_all = ds.sizes["token"]
    ds, subset = select_tokens(ds, tokens)
    ds = select_steps(ds, steps)
    with _progress(quiet=quiet):
        table = accounting(ds)
    found = verdict(table)
    rows = table[list(COLUMNS)].to_dataframe().rename_axis("t").reset_index()
    if format_ == "csv":
        text = rows.to_csv(index=False)
    elif format_ == "json":
        n_tokens = ds.token.size
        text = _as_json(store, {"subset": subset, "n": n_tokens}, rows, found)
    else:
        title = _title(store, ds, subset, n_all)
        text = f"{title}\n\n{_as_table(rows)}\n\n{found.text}\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
    if not quiet and (output is not None or format_ == "csv"):
        click.echo(found.text, err=True)
    return found.holds


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
    store: Path, tokens: dict[str, str | int], rows: "pd.DataFrame", found: "Verdict"
) -> str:
    """Return the check as strict JSON: what is not a finite number is null."""
    summary = _summary(rows)
    content = {
        "store": str(store),
        "tokens": tokens,
        "steps": [int(rows.t.min()), int(rows.t.max())],
        "rows": [_finite(row) for row in rows.to_dict("records")],
        "summary": {name: _finite(column.to_dict()) for name, column in summary.items()},
        "holds": found.holds,
        "verdict": found.text,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _finite(values: Mapping[Hashable, float]) -> dict[str, float | None]:
    return {str(name): v if math.isfinite(v) else None for name, v in values.items()}


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[None]:
    from tqdm.dask import TqdmCallback

    with TqdmCallback(desc="checking", disable=True if quiet else None, leave=False):
        yield
