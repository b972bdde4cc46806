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
    from thimble_zarr.store.integrity.verify import Finding, Verified


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

    That is sizes, checksums, metadata and the ledger; nothing is computed and nothing is written.
    It works on a STORE that is being recorded, too.
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
    help="Repair it. Without this the command says what it would do, and writes nothing.",
)
@QUIET
@click.pass_context
def repair(ctx: click.Context, store: Path, *, is_applied: bool, quiet: bool) -> None:
    """Cut STORE down to what can be read, and tidy up after a crash.

    The rows before the first block that cannot be read stay. All later rows go, so keep a copy if
    you want them. Per-step values that cannot be read become missing, and labels are left out.
    Metadata and the commit record are written again. A file that can be read but was changed after
    it was recorded is written again if the ledger proves what its values were. Otherwise it is left
    as it is, and STORE stays DAMAGED: `check` may name the value, and a copy has the file.
    Exit code 0 if STORE is sound (with --apply: after it), 1 if it is not.
    """
    from thimble_zarr.store.integrity.repair import plan_repair
    from thimble_zarr.store.integrity.repair import repair as repair_store

    plan = repair_store(store) if is_applied else plan_repair(store)
    for line in (*plan.steps, *plan.left):
        click.echo(line)
    for problem in plan.hopeless:
        click.echo(f"cannot be repaired: {problem}")
    verified = _verified(store, quiet=quiet)
    if plan.hopeless:
        click.echo("Nothing is done: restore what is damaged from a copy.")
    elif not plan.steps and plan.left:
        click.echo(
            "Nothing here can be repaired; the store stays DAMAGED until these files are restored."
        )
    elif not plan.steps:
        click.echo("There is nothing to repair.")
    elif is_applied and plan.left:
        click.echo("The rest is repaired. The store stays DAMAGED by what is left as it is.")
    elif is_applied:
        click.echo(_verdict(verified, store))
    else:
        click.echo(f"Nothing is done yet: thimble-zarr repair {shlex.quote(str(store))} --apply")
    ctx.exit(0 if verified.is_sound else FOUND)


def _verified(store: Path, *, quiet: bool) -> "Verified":
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.store.integrity.verify import verify as verify_store

    with progress("verifying", unit="B", quiet=quiet) as bar:
        return verify_store(store, bar.reach)


def _in_words(verified: "Verified", store: Path) -> str:
    lines = [
        ("Store", f"{store}: {verified.n_rows:,} rows committed"),
        ("Read", f"{verified.n_files:,} files, {human_bytes(verified.n_bytes)}"),
    ]
    text = "\n".join(f"{name:<8} {value}" for name, value in lines)
    below = [*map(_line, verified.findings)]
    below += [f"repair  {step}." for step in verified.repairs]
    if below:
        text += "\n\n" + "\n".join(below)
    return f"{text}\n\n{_verdict(verified, store)}"


def _line(finding: "Finding") -> str:
    word = "DAMAGE" if finding.is_damage else "note"
    return f"{word:<6}  {finding.where}: {finding.what}. Repair: {finding.repair}."


def _verdict(verified: "Verified", store: Path) -> str:
    from thimble_zarr.store.contents import why_empty

    if verified.is_sound and not verified.n_rows:
        return f"Nothing is committed yet, and so nothing is compared: {why_empty(verified.path)}."
    if verified.is_sound and verified.repairs:
        return (
            "SOUND after repair: every byte is the one that was committed, or one that the repair "
            "wrote in place of what was lost."
        )
    if verified.is_sound:
        return "SOUND: every byte of every committed row is the one that was committed."
    damages = [finding for finding in verified.findings if finding.is_damage]
    places = f"{len(damages):,} {'place' if len(damages) == 1 else 'places'}"
    if all(finding.repair.startswith("none") for finding in damages):
        return f"DAMAGED in {places}, which repair leaves as they are: restore them from a copy."
    return f"DAMAGED in {places}; what can be done: thimble-zarr repair {shlex.quote(str(store))}"
