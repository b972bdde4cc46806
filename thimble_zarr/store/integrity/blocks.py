"""Which blocks a repair keeps, and what it makes of lines of the ledger that are lost."""

from collections.abc import Mapping
from dataclasses import astuple

from thimble_zarr.format.schema import Json
from thimble_zarr.store.integrity.files import State, compare_file, own_checksums, recorded_as
from thimble_zarr.store.integrity.plan import Plan
from thimble_zarr.store.metadata import Declared


def plan_blocks(plan: Plan) -> None:
    """Keep the rows before the first block that cannot be read."""
    expected = plan.expected
    sharded = {array: found for array, found in plan.arrays() if found.is_sharded}
    unknown = _blocks_without_line(plan, sharded)
    lost = []
    for key, record in expected.files.items():
        if record.crc32 is not None:
            continue
        file = compare_file(expected, key)
        if file.state is State.LOST:
            plan.n_rows = min(plan.n_rows, record.first_row)
            lost.append(key)
        elif file.state is State.ALTERED:
            plan.altered[key] = file.problem
        elif file.state is State.UNTOLD:
            unknown.setdefault(record.first_row, record.end_row)
        elif file.record is not record and file.record is not None:
            # It was stored again, and the commit was cut off: what is there is one line more.
            plan.settled[key] = file.record
    for first_row, end_row in sorted(unknown.items()):
        if first_row >= plan.n_rows or not _rebuild(plan, first_row, end_row, sharded):
            break
    if plan.is_cut:
        why = f", because {', '.join(lost)} cannot be read" if lost else ""
        plan.steps.append(
            f"end the store before row {plan.n_rows}{why}: of {expected.n_rows} committed rows "
            f"{plan.n_rows} stay and {expected.n_rows - plan.n_rows} go"
        )
    if plan.n_rows == 0:
        plan.hopeless.append("its first block cannot be read, and so no row would be left")


def _blocks_without_line(plan: Plan, sharded: Mapping[str, Declared]) -> dict[int, int]:
    """Return first row and end of each block that has rows of which the ledger says nothing."""
    length = next((declared.file_shape[0] for declared in sharded.values()), 1)
    return {
        first_row: min(stop, first_row + length)
        for start, stop in plan.expected.missing_rows()
        for first_row in range(start - start % length, stop, length)
    }


def _rebuild(plan: Plan, first_row: int, end_row: int, sharded: Mapping[str, Declared]) -> bool:
    """Make the line of a block from its files, or end the store there; return whether it goes on.

    The line may be there and have fewer rows than the commit record claims.
    """
    expected = plan.expected
    end_row = min(end_row, plan.n_rows)
    known = [
        key
        for key, record in expected.files.items()
        if record.first_row == first_row and record.crc32 is None
    ]
    if known and all(compare_file(expected, key).state is State.RECORDED for key in known):
        plan.n_rows = min(plan.n_rows, expected.lines[first_row][1])
        return False
    files: dict[str, Json] = {}
    chunks: dict[str, Json] = {}
    for array, declared in sharded.items():
        block = first_row // declared.file_shape[0]
        key = f"{array}/c.{block}{'.0' * (len(declared.shape) - 1)}"
        try:
            checksums = own_checksums(expected, key)
        except (OSError, ValueError, RuntimeError):
            plan.n_rows = min(plan.n_rows, first_row)
            return False
        recorded = recorded_as(expected, checksums)
        if recorded not in (None, key):
            plan.hopeless.append(
                f"{key} is the file that was recorded as {recorded}, and the line of the "
                f"ledger that tells which file belongs there is lost; restore {key} from a copy"
            )
        files[key] = {"bytes": (expected.path / key).stat().st_size}
        chunks[array] = [astuple(pair) for pair in checksums]
    plan.rebuilt[first_row] = {"rows": (first_row, end_row), "files": files, "chunks": chunks}
    plan.steps.append(
        f"keep rows {first_row} to {end_row - 1} as they are: the checksums in their files are "
        "right, and the ledger's are lost"
    )
    return True
