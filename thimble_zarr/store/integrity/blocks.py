"""Which blocks a repair keeps, and what it makes of lines of the ledger that are lost."""

from collections.abc import Iterator
from dataclasses import replace

from thimble_zarr.store.integrity.files import Comparison, FileState, compare_file
from thimble_zarr.store.integrity.plan import Plan
from thimble_zarr.store.keys import array_of


def plan_blocks(plan: Plan) -> None:
    """Keep the rows before the first block that cannot be read."""
    expected, lost, files = plan.expected, [], {}
    for key, first_row, end_row in _shards(plan):
        file = compare_file(expected, key)
        if file.state is FileState.LOST:
            plan.n_rows = min(plan.n_rows, first_row)
            lost.append(key)
        elif file.state is FileState.RECORDED and file.record.end_row < end_row:
            # The commit record claims more rows than the line of their block.
            plan.n_rows = min(plan.n_rows, file.record.end_row)
        files[key] = first_row, end_row, file
    for key, (first_row, end_row, file) in files.items():
        if first_row < plan.n_rows:
            _keep(plan, key, (first_row, min(end_row, plan.n_rows)), file)
    plan.steps += [
        f"keep rows {first_row} to {end_row - 1} as they are: the checksums in their files are "
        "right, and the ledger's are lost"
        for first_row, end_row in plan.rebuilt.items()
    ]
    if plan.n_rows == 0:
        plan.hopeless.append("its first block cannot be read, and so no row would be left")
    elif gone := expected.n_rows - plan.n_rows:
        why = f", because {', '.join(lost)} cannot be read" if lost else ""
        plan.steps.append(
            f"end the store before row {plan.n_rows}{why}: of {expected.n_rows} committed rows "
            f"{plan.n_rows} stay and {gone} go"
        )


def _shards(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """Yield the shards that there should be, each with the rows of its block."""
    recorded = {array_of(key) for key in plan.expected.records}
    for array, declared in plan.arrays():
        if not declared.is_sharded or (recorded and array not in recorded):
            continue
        length = declared.file_shape[0]
        for block in range(-(-plan.n_rows // length)):
            end_row = min((block + 1) * length, plan.expected.n_rows)
            yield f"{array}/c.{block}{'.0' * (len(declared.shape) - 1)}", block * length, end_row


def _keep(plan: Plan, key: str, rows: tuple[int, int], file: Comparison) -> None:
    """Have the ledger say of a shard what it is, or leave it as it is."""
    plan.keep(key, file.record)
    if file.state is FileState.UNTOLD:
        plan.keep(key, replace(file.record, first_row=rows[0], end_row=rows[1]))
        plan.rebuilt[rows[0]] = rows[1]
    elif file.state is FileState.ALTERED and key in plan.expected.records:
        plan.altered[key] = file.problem
    elif file.state is FileState.ALTERED:
        plan.hopeless.append(
            f"{key}: {file.problem}, and the line of the ledger that tells which file belongs "
            f"here is lost; restore {key} from a copy"
        )
