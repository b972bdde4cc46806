"""What a repair does, as data, and which rows it keeps: nothing of it is done yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from thimble_zarr.format.schema import Json
from thimble_zarr.store.integrity.expected import Expected
from thimble_zarr.store.integrity.files import Comparison, FileState, compare_file
from thimble_zarr.store.integrity.verify_result import HOW_TO_RESTORE
from thimble_zarr.store.keys import array_of
from thimble_zarr.store.ledger import Commit, FileRecord, seal, tell


@dataclass
class Plan:
    """What a repair does.

    Attributes
    ----------
    expected, n_rows
        What there should be, and how many rows stay.
    records
        The files that stay, and what the ledger says of them from now on.
    steps, left, hopeless
        In words: what is done, in order; damage that stays; and why nothing can be done at all.
    written, removed, dropped
        Contents of the files that are written again, files that go, and arrays that are left out.
    rebuilt
        The rows of blocks whose lines are made from their files: the row behind each, by its first.
    lines, commit
        Lines that are added to the ledger, None if it stays; and the commit record, None likewise.
    """

    expected: Expected
    n_rows: int
    records: dict[str, FileRecord] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    hopeless: list[str] = field(default_factory=list)
    written: dict[str, bytes] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    rebuilt: dict[int, int] = field(default_factory=dict)
    lines: list[bytes] | None = None
    commit: Commit | None = None

    def leave(self, key: str, file: Comparison) -> None:
        """Leave a file as it is, though it is not the one that was committed."""
        self.records[key] = file.record
        self.left.append(f"{key} is left as it is: {file.problem}; {HOW_TO_RESTORE}")

    def line(self, first_row: int, end_row: int, **more: Json) -> bytes:
        """Return a line for a block's shards, and also for all values if it replaces a commit."""
        is_last = "replaces" in more
        told = {
            key: record
            for key, record in self.records.items()
            if (is_last if record.chunks is None else record.first_row == first_row)
        }
        line: dict[str, Json] = {"rows": (first_row, end_row), **tell(told)}
        return seal(line | more) + b"\n"


def plan_blocks(plan: Plan) -> None:
    """Keep the rows before the first block that cannot be read."""
    expected, files = plan.expected, {}
    for key, _, first_row in expected.files_of_arrays(plan.n_rows, sharded=True):
        file, length = compare_file(expected, key), expected.rows_a_file(array_of(key))
        files[key] = first_row, min(first_row + length, expected.n_rows), file
    # Of a block whose last line is lost some files may be as a line before it told.
    untold = {row for row, _, file in files.values() if file.state is FileState.UNTOLD}
    for first_row, end_row, file in files.values():
        is_told = file.state is FileState.RECORDED and first_row not in untold
        if file.state is FileState.LOST:
            plan.n_rows = min(plan.n_rows, first_row)
        elif is_told and file.record.end_row < end_row:
            # The commit record claims more rows than the line of their block.
            plan.n_rows = min(plan.n_rows, file.record.end_row)
    for key, (first_row, end_row, file) in files.items():
        if first_row >= plan.n_rows:
            continue
        plan.records[key] = file.record
        if first_row in untold and file.state in (FileState.UNTOLD, FileState.RECORDED):
            stop = plan.rebuilt[first_row] = min(end_row, plan.n_rows)
            record = replace(file.record, first_row=first_row, end_row=stop, values=None)
            plan.records[key] = record
        elif file.state is FileState.ALTERED and key in expected.ledger.records:
            plan.leave(key, file)
        elif file.state is FileState.ALTERED:
            plan.hopeless.append(
                f"{key}: {file.problem}, and the line of the ledger that tells which file belongs "
                f"here is lost; restore {key} from a copy"
            )
    _tell_of_blocks(plan, files)


def _tell_of_blocks(plan: Plan, files: Mapping[str, tuple[int, int, Comparison]]) -> None:
    """Put into words which blocks stay: given the rows of each file, and what became of it."""
    plan.steps += [
        f"keep rows {first_row} to {end_row - 1} as they are: the checksums in their files are "
        "right, and the ledger's are lost"
        for first_row, end_row in plan.rebuilt.items()
    ]
    if plan.n_rows == 0:
        plan.hopeless.append("its first block cannot be read, and so no row would be left")
    elif gone := plan.expected.n_rows - plan.n_rows:
        at_the_end = [key for key, (first_row, _, _) in files.items() if first_row == plan.n_rows]
        lost = [key for key in at_the_end if files[key][2].state is FileState.LOST]
        why = f", because {', '.join(lost)} cannot be read" if lost else ""
        plan.steps.append(
            f"end the store before row {plan.n_rows}{why}: of {plan.expected.n_rows} committed "
            f"rows {plan.n_rows} stay and {gone} go"
        )
