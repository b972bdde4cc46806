"""`verify` and `repair`: is every byte the one that was committed, and if not, what then?"""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thimble_zarr.cli.options import FOUND, QUIET, STORE, format_option
from thimble_zarr.format.layout import human_bytes
from thimble_zarr.format.location import Location

if TYPE_CHECKING:
    from thimble_zarr.store.integrity.verify_result import VerifyResult


@click.command()
@STORE
@format_option("table", "json", help="A table for people, or everything for machines.")
@QUIET
@click.pass_context
def verify(ctx: click.Context, store: Location, *, format_: str, quiet: bool) -> None:
    """Read every byte of STORE and compare it with what was committed.

    That is sizes, checksums, metadata and the ledger; nothing is computed and nothing is written.
    It works on a STORE that is being recorded, too.
    Exit code 0 if all that was committed is there, whatever a crash left beside it; 1 if it is not.
    """
    result = _verify(store, quiet=quiet)
    is_json = format_ == "json"
    click.echo(json.dumps(result.to_json(), indent=1) if is_json else _in_words(result))
    ctx.exit(0 if result.holds else FOUND)


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
    hopeless = (f"cannot be repaired: {problem}" for problem in plan.hopeless)
    for line in (*plan.steps, *plan.left, *hopeless):
        click.echo(line)
    result = _verify(store, quiet=quiet)
    if plan.hopeless:
        end = "Nothing is done: restore what is damaged from a copy."
    elif plan.steps and not is_applied:
        end = f"Nothing is done yet: thimble-zarr repair {shlex.quote(str(store))} --apply"
    elif plan.left:
        end = (
            "Nothing here can be repaired; the store stays DAMAGED until these files are restored."
        )
        if plan.steps:
            end = "The rest is repaired. The store stays DAMAGED by what is left as it is."
    else:
        end = _verdict(result) if plan.steps else "There is nothing to repair."
    click.echo(end)
    ctx.exit(0 if result.holds else FOUND)


def _verify(store: Location, *, quiet: bool) -> "VerifyResult":
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.store.integrity.verify import verify

    with progress("verifying", unit="B", quiet=quiet) as bar:
        return verify(store, bar.reach)


def _in_words(result: "VerifyResult") -> str:
    head = (
        f"{'Store':<8} {result.path}: {result.n_rows:,} rows committed\n"
        f"{'Read':<8} {result.n_files:,} files, {human_bytes(result.n_bytes)}"
    )
    body = [
        f"{'DAMAGE' if one.is_damage else 'note  '}  {one.where}: {one.what}. Repair: {one.repair}."
        for one in result.findings
    ]
    body += [f"repair  {step}." for step in result.repairs]
    return "\n\n".join(filter(None, [head, "\n".join(body), _verdict(result)]))


def _verdict(result: "VerifyResult") -> str:
    from thimble_zarr.store.contents import why_empty

    if result.holds and not result.n_rows:
        return f"Nothing is committed yet, and so nothing is compared: {why_empty(result.path)}."
    if result.holds and result.repairs:
        return (
            "SOUND after repair: every byte is the one that was committed, or one that the repair "
            "wrote in place of what was lost."
        )
    if result.holds:
        return "SOUND: every byte of every committed row is the one that was committed."
    damages = [finding for finding in result.findings if finding.is_damage]
    places = f"{len(damages):,} {'place' if len(damages) == 1 else 'places'}"
    if all(finding.is_beyond_repair for finding in damages):
        return f"DAMAGED in {places}, which repair leaves as they are: restore them from a copy."
    command = f"thimble-zarr repair {shlex.quote(str(result.path))}"
    return f"DAMAGED in {places}; what can be done: {command}"
