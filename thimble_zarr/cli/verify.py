"""`verify` and `repair`: is every byte the one that was committed, and if not, what then?"""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thimble_zarr.cli.exits import FOUND
from thimble_zarr.cli.options import QUIET, STORE
from thimble_zarr.format.layout import human_bytes

if TYPE_CHECKING:
    from thimble_zarr.format.verify import Finding, Verified


@click.command()
@STORE
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A table for people, or everything for machines.",
)
@QUIET
@click.pass_context
def verify(ctx: click.Context, store: Path, *, format_: str, quiet: bool) -> None:
    """Read every byte of STORE and compare it with what was committed.

    Sizes, checksums, metadata and bookkeeping; nothing is computed and nothing is written. STORE
    may be recorded meanwhile.
    Exit code 0 if all that was committed is there, whatever a crash left beside it; 1 if it is not.
    """
    verified = _verified(store, quiet=quiet)
    if format_ == "json":
        content = asdict(verified) | {"path": str(store), "sound": verified.is_sound}
        click.echo(json.dumps(content, indent=1))
    else:
        click.echo(_in_words(verified, store))
    ctx.exit(0 if verified.is_sound else FOUND)


@click.command()
@STORE
@click.option(
    "--apply",
    "is_applied",
    is_flag=True,
    help="Do it. Without this the command says what it would do, and writes nothing.",
)
@QUIET
@click.pass_context
def repair(ctx: click.Context, store: Path, *, is_applied: bool, quiet: bool) -> None:
    """Cut STORE down to what is sound, and take away what a crash left beside it.

    The rows before the first damaged block stay. Per-step values that are lost become missing,
    labels that are lost are left out, metadata and bookkeeping are made anew. Nothing that is sound
    is touched, but blocks behind a damaged one, which go with it: keep a copy if you want them.
    Exit code 0 if STORE is sound (with --apply: now), 1 if it is not.
    """
    from thimble_zarr.format.repair import plan_repair
    from thimble_zarr.format.repair import repair as repair_store

    plan = repair_store(store) if is_applied else plan_repair(store)
    for step in plan.steps:
        click.echo(step)
    for problem in plan.hopeless:
        click.echo(f"cannot be repaired: {problem}")
    verified = _verified(store, quiet=quiet)
    if plan.hopeless:
        click.echo("Nothing is done: restore what is damaged from a copy.")
    elif not plan.steps:
        click.echo("There is nothing to repair.")
    elif is_applied:
        click.echo(_verdict(verified, store))
    else:
        click.echo(f"Nothing is done yet: thimble-zarr repair {shlex.quote(str(store))} --apply")
    ctx.exit(0 if verified.is_sound else FOUND)


def _verified(store: Path, *, quiet: bool) -> "Verified":
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.format.verify import verify as verify_store

    with progress("verifying", unit="B", quiet=quiet) as bar:
        return verify_store(store, bar.reach)


def _in_words(verified: "Verified", store: Path) -> str:
    lines = [
        ("Store", f"{store}: {verified.n_rows:,} rows committed"),
        ("Read", f"{verified.n_files:,} files, {human_bytes(verified.n_bytes)}"),
    ]
    text = "\n".join(f"{name:<8} {value}" for name, value in lines)
    if verified.findings:
        text += "\n\n" + "\n".join(map(_line, verified.findings))
    return f"{text}\n\n{_verdict(verified, store)}"


def _line(finding: "Finding") -> str:
    word = "DAMAGE" if finding.is_damage else "note"
    return f"{word:<6}  {finding.where}: {finding.what}. Repair: {finding.repair}."


def _verdict(verified: "Verified", store: Path) -> str:
    from thimble_zarr.format.lock import why_empty

    if verified.is_sound and not verified.n_rows:
        return f"Nothing is committed yet, and so nothing is compared: {why_empty(verified.path)}."
    if verified.is_sound:
        return "SOUND: every byte of every committed row is the one that was committed."
    n_damaged = sum(finding.is_damage for finding in verified.findings)
    return (
        f"DAMAGED in {n_damaged:,} {'place' if n_damaged == 1 else 'places'}; what can be done: "
        f"thimble-zarr repair {shlex.quote(str(store))}"
    )
