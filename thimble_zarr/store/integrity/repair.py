"""Cut a store down to what can be read, and remove what a crash left beside it.

A file that cannot be decoded is lost. The rows before the first lost block stay, and the rows
behind it go; lost per-step values become missing, and lost labels are left out. Damaged metadata
are written as they were declared. Lines of the ledger that are lost are made from the files whose
own checksums are right. What was done is one more line in the ledger.

A file that decodes but is not the one in the ledger was changed by another program. It is written
again only where its recorded values are certain: labels of steps and tokens are known if all were
recorded, and per-step values with one of them put right may have the checksum in the ledger.
Otherwise most of its values are the recorded ones and nothing here tells which, so it is left as it
is, and the store stays damaged until the file is restored. The ledger, not the commit record, says
how many rows there are.

It is done in an order that can be cut off anywhere and started again::

    values and metadata -> ledger -> commit record -> removal
"""

import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from thimble_zarr.errors import DamagedStoreError, StoreError
from thimble_zarr.format.overhead import Stopwatch
from thimble_zarr.format.schema import ATTRIBUTE, Json, Schema
from thimble_zarr.store.files.disk import Disk, remove_file
from thimble_zarr.store.files.documents import leads_out
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.integrity.verify import (
    HOW_TO_RESTORE,
    Contents,
    Document,
    Record,
    check_metadata,
    consolidated_copies,
    copies_fit,
    files_of,
    find_leftovers,
    how_altered,
    is_at_work,
    is_per_step,
    is_same,
    is_sound_by_itself,
    matching_record,
    own_checksums,
    read_contents,
    read_found,
)
from thimble_zarr.store.keys import COMMIT, HOLDER, LEDGER, METADATA, array_of, is_chunk_key
from thimble_zarr.store.ledger import Commit, read_lines, seal
from thimble_zarr.store.lock import WriterLock, check_not_recorded
from thimble_zarr.store.metadata import Declared
from thimble_zarr.store.reader import StorePath
from thimble_zarr.store.shard import decode_vector, encode_vector

FileRecord = dict[str, int]

_COUNTED = ("step", "token")
"""Arrays whose values are their own positions, where all of them are recorded."""

_TEXT = ("text_bytes", "text_end")
"""Labels that are of no use without each other."""


@dataclass
class Plan:
    """What a repair does.

    Attributes
    ----------
    contents
        What there should be.
    n_rows
        Rows that stay.
    steps
        What is done, in words, in order.
    hopeless
        Why the store cannot be repaired; then nothing is done.
    left
        Damage that stays, in words.
    written
        Contents of the files that are written again.
    lines
        Lines that are added to the ledger.
    dropped
        Arrays that are left out from now on.
    removed
        Files that go.
    """

    contents: Contents
    n_rows: int
    steps: list[str] = field(default_factory=list)
    hopeless: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    written: dict[str, bytes] = field(default_factory=dict)
    lines: list[bytes] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changes_ledger: bool = False
    changes_commit: bool = False


def plan_repair(path: StorePath) -> Plan:
    """Find out what a repair would do. Every byte of the store is read, and nothing is written.

    Raises
    ------
    StoreLockedError
        If it is being recorded.
    NotAStoreError, UnsupportedFormatError, DamagedStoreError
        If there is no store at `path`, or too little of one.
    StoreError
        If it cannot be read.
    """
    path = Path(path).absolute()
    _check_not_recorded(path)
    return _planned(path)


def _check_not_recorded(path: Path) -> None:
    """Raise an error where there is no store, or one that a writer may be recording."""
    if not read_contents(path).is_complete:
        check_not_recorded(LocalFiles(path))


def _planned(path: Path) -> Plan:
    """Plan the repair of a store that nobody records into."""
    try:
        return _Planner(read_contents(path)).plan()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot read {path}: {error}") from error


def repair(path: StorePath) -> Plan:
    """Repair a store, and return what was done.

    Raises
    ------
    StoreLockedError
        If it is being recorded.
    StoreError
        If nothing of it can be kept, or it cannot be written. Then it is as it was, or repairing it
        again continues where this one stopped.
    """
    path = Path(path).absolute()
    _check_not_recorded(path)
    names_a_writer = (path / HOLDER).exists()
    lock = WriterLock(path)
    try:
        plan = _planned(path)
        if plan.hopeless:
            raise StoreError(f"cannot repair {path}: {'; '.join(plan.hopeless)}")
        _apply(plan)
    finally:
        lock.release()
    if names_a_writer:  # one that is gone: taking the lock replaced its name, before the plan
        plan.steps.append(f"remove {HOLDER}")
    return plan


# --- what is to be done --------------------------------------------------------------------------


class _Planner:
    """Goes through a store once."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._path = contents.path
        self._plan = Plan(contents, contents.n_rows)
        self._documents = self._metadata()
        self._files: dict[str, FileRecord] = {}
        self._rebuilt: dict[int, Mapping[str, Any]] = {}
        self._settled: dict[str, Record] = {}
        self._unknown = dict(contents.missing_rows())
        self._lost: list[str] = []
        self._left: dict[str, str] = {}
        self._of_values: list[str] = []

    def plan(self) -> Plan:
        plan, contents = self._plan, self._contents
        plan.hopeless += [
            f"{array} is a link that leads out of the store, and is not followed"
            for array, _ in self._arrays()
            if leads_out(self._path / array, self._path)
        ]
        if plan.hopeless:
            return plan
        if contents.n_rows:
            self._check_blocks()
            self._rebuild_lines()
            if plan.n_rows == 0:
                plan.hopeless.append("its first block cannot be read, and so no row would be left")
                return plan
            self._cut_off()
            self._mend_values()
        self._of_values = plan.steps.copy()
        self._mend_metadata()
        self._mend_bookkeeping()
        self._find_removed()
        plan.left += [what for key, what in self._left.items() if key not in plan.removed]
        return plan

    def _metadata(self) -> dict[str, Document]:
        """Return every document: as declared, or where that is lost as it is on disk."""
        if self._contents.metadata:
            return dict(self._contents.metadata)
        keys = (
            file.relative_to(self._path).as_posix() for file in sorted(self._path.rglob(METADATA))
        )
        return {key: read_found(self._path / key)[0] for key in keys}

    def _arrays(self) -> Iterator[tuple[str, Declared]]:
        for key, document in self._documents.items():
            if document.get("node_type") == "array":
                with suppress(ValueError):
                    yield array_of(key), Declared.of(document)

    def _check_blocks(self) -> None:
        """Keep the rows before the first damaged block."""
        contents, plan = self._contents, self._plan
        for key, (committed, *_) in contents.records.items():
            if committed.line >= contents.end or committed.crc32 is not None:
                continue
            record = matching_record(contents, key)
            if record is None and contents.may_be_out_of_date(committed):
                self._unknown[committed.first_row] = committed.end_row
            elif record is None and is_sound_by_itself(contents, key):
                self._leave(key)
            elif record is None:
                plan.n_rows = min(plan.n_rows, committed.first_row)
                self._lost.append(key)
            elif record is not committed:
                # It was stored again, and the commit was cut off: what is there is one line more.
                self._settled[key] = record

    def _leave(self, key: str) -> None:
        """Leave a file that another program changed as it is."""
        what = how_altered(self._contents, key)
        self._left[key] = f"{key} is left as it is: {what}; {HOW_TO_RESTORE}"

    def _rebuild_lines(self) -> None:
        """Make lines that are lost from the files of their blocks."""
        plan, contents = self._plan, self._contents
        sharded = [(array, found) for array, found in self._arrays() if found.is_sharded]
        for start, stop in sorted(self._unknown.items()):
            steps = sharded[0][1].file_shape[0] if sharded else 1
            for first_row in range(start - start % steps, min(stop, plan.n_rows), steps):
                end_row = min(stop, first_row + steps)
                if self._is_as_in_ledger(first_row):
                    # Its line is there, and has fewer rows than the commit record claims.
                    plan.n_rows = min(plan.n_rows, contents.lines[first_row][1])
                    return
                line = self._rebuilt_line(first_row, end_row, sharded)
                if line is None:
                    plan.n_rows = min(plan.n_rows, first_row)
                    return
                self._rebuilt[first_row] = line
                plan.steps.append(
                    f"keep rows {first_row} to {end_row - 1} as they are: the checksums in their "
                    "files are right, and the ledger's are lost"
                )

    def _is_as_in_ledger(self, first_row: int) -> bool:
        """Whether the shards of a block are the ones that its line in the ledger tells of."""
        contents = self._contents
        if first_row not in contents.lines:
            return False
        keys = [
            key
            for key, (committed, *_) in contents.records.items()
            if committed.first_row == first_row and committed.crc32 is None
        ]
        return bool(keys) and all(matching_record(contents, key) for key in keys)

    def _rebuilt_line(
        self, first_row: int, end_row: int, sharded: list[tuple[str, Declared]]
    ) -> dict[str, Json] | None:
        files: dict[str, Json] = {}
        chunks: dict[str, Json] = {}
        for array, declared in sharded:
            block = first_row // declared.file_shape[0]
            key = f"{array}/c.{block}{'.0' * (len(declared.shape) - 1)}"
            try:
                checksums = own_checksums(self._contents, key)
            except (OSError, ValueError, RuntimeError):
                return None
            recorded = self._contents.recorded_files.get(tuple(chunk.stored for chunk in checksums))
            if recorded not in (None, key):
                self._plan.hopeless.append(
                    f"{key} is the file that was recorded as {recorded}, and the line of the "
                    f"ledger that tells which file belongs there is lost; restore {key} from a copy"
                )
            files[key] = {"bytes": (self._path / key).stat().st_size}
            chunks[array] = [astuple(pair) for pair in checksums]
        return {"rows": (first_row, end_row), "files": files, "chunks": chunks}

    def _cut_off(self) -> None:
        """End the store before the first row that is lost."""
        plan, contents = self._plan, self._contents
        lost = contents.n_rows - plan.n_rows
        if not lost:
            return
        why = f", because {', '.join(self._lost)} cannot be read" if self._lost else ""
        plan.steps.append(
            f"end the store before row {plan.n_rows}{why}: of {contents.n_rows} committed rows "
            f"{plan.n_rows} stay and {lost} go"
        )

    def _find_removed(self) -> None:
        """Remove what lies behind the rows that stay, and what else a crash left."""
        plan, contents = self._plan, self._contents
        if contents.n_rows and not is_at_work(contents):
            lengths = {
                array: declared.file_shape[0]
                for array, declared in self._arrays()
                if is_per_step(self._documents[f"{array}/{METADATA}"])
            }
            plan.removed += [
                key
                for key in files_of(self._path)
                if is_chunk_key(key)
                and array_of(key) in lengths
                and _index(key) * lengths[array_of(key)] >= plan.n_rows
            ]
        leftovers = [one.where for one in find_leftovers(contents) if one.kind == "leftover"]
        plan.removed += [key for key in leftovers if key not in plan.removed]
        plan.steps += [f"remove {key}" for key in plan.removed]

    def _mend_values(self) -> None:
        """Keep files of values that can be read; write or leave out those that cannot."""
        for array, declared in list(self._arrays()):
            if declared.is_sharded or array in self._plan.dropped:
                continue
            per_step = is_per_step(self._documents[f"{array}/{METADATA}"])
            length = self._plan.n_rows if per_step else declared.shape[0]
            for index in range(math.ceil(length / declared.file_shape[0])):
                self._mend_file(f"{array}/c.{index}", declared, per_step=per_step)

    def _mend_file(self, key: str, declared: Declared, *, per_step: bool) -> None:
        contents, plan = self._contents, self._plan
        array = array_of(key)
        if key in contents.records:
            record = matching_record(contents, key)
            if record is not None and record.crc32 is not None:
                self._files[key] = {"bytes": record.n_bytes, "crc32": record.crc32}
                if record.line >= contents.end:
                    plan.changes_ledger = True
                return
        name, known = array.rpartition("/")[2], contents.records.get(key)
        is_chosen = self._is_chosen(array)
        if is_sound_by_itself(contents, key):
            if known is None or contents.may_be_out_of_date(known[0]):
                plan.changes_ledger = True
                plan.steps.append(
                    f"keep {key} as it is: its own checksum is right, and the ledger's is lost"
                )
                self._files[key] = _file_record((self._path / key).read_bytes())
                return
            if (is_chosen or name not in _COUNTED) and not self._is_missing(key, declared):
                self._files[key] = {"bytes": known[0].n_bytes, "crc32": known[0].crc32 or 0}
                self._restore(key, declared, known[0])
                return
        plan.changes_ledger = True
        if is_chosen:
            plan.hopeless.append(
                f"{key} cannot be read, and nothing else tells which {name}s were recorded; "
                "restore it from a copy"
            )
            return
        if not (per_step or name in _COUNTED):
            together = _TEXT if name in _TEXT else (name,)
            self._drop(key, [array.removesuffix(name) + other for other in together])
            return
        values = np.full(declared.file_shape[0], declared.fill).astype(declared.dtype)
        start = _index(key) * len(values)
        last = min(start + len(values), plan.n_rows) - 1
        what = f"the values of rows {start} to {last} cannot be read, and become missing"
        if name in _COUNTED:
            stop = min(start + len(values), plan.n_rows if per_step else declared.shape[0])
            order = np.arange(stop) if per_step else self._stored_order(array)
            if order is None or len(order) < stop:
                plan.hopeless.append(
                    f"{key} cannot be read, and neither can the order of the {name}s; restore it "
                    "from a copy"
                )
                return
            values[: stop - start] = order[start:stop]
            what = "its values are known"
        plan.steps.append(f"write {key} again: {what}")
        content = plan.written[key] = encode_vector(values)
        self._files[key] = _file_record(content)

    def _is_missing(self, key: str, declared: Declared) -> bool:
        """Whether no value of a file is there, as where a repair was cut off after it wrote it."""
        values = self._values(key, declared)
        return bool(np.array_equal(values, np.full_like(values, declared.fill), equal_nan=True))

    def _values(self, key: str, declared: Declared) -> np.ndarray:
        content = (self._path / key).read_bytes()
        return decode_vector(content, declared.file_shape[0], declared.dtype)

    def _restore(self, key: str, declared: Declared, record: Record) -> None:
        """Write a file as it was recorded, if its checksum in the ledger proves that; or leave it.

        What is tried are its values as they are, which may only have been compressed again, and
        with one of them put right.
        """
        values = self._values(key, declared)
        for row, value in _guesses(values):
            tried = values.copy()
            tried[row] = value
            content = encode_vector(tried)
            if _file_record(content) == {"bytes": record.n_bytes, "crc32": record.crc32}:
                self._plan.written[key] = content
                what = "its values are the recorded ones"
                if tried.tobytes() != values.tobytes():
                    row += _index(key) * len(values)
                    what = (
                        f"its row {row} is {float(value)} again, and its checksum the recorded one"
                    )
                self._plan.steps.append(f"write {key} again: {what}")
                return
        self._leave(key)

    def _is_chosen(self, array: str) -> bool:
        """Whether an array labels what was chosen for recording, which nothing else tells."""
        name, schema = array.rpartition("/")[2], self._schema_of(array)
        if not isinstance(schema, dict):
            return False
        if name == "step":
            return schema.get("schedule") is not None
        dims = schema.get("dims")
        first = dims[:1] if isinstance(dims, list) else []
        return schema.get("whole_tokens") is not None and first == [name]

    def _stored_order(self, array: str) -> np.ndarray | None:
        """Return the tokens in the order in which they lie on disk, None where that is lost."""
        try:
            schema = Schema.from_attribute(self._schema_of(array))
        except DamagedStoreError:
            return None
        return np.arange(schema.n_tokens) if schema.stored_order is None else schema.stored_order

    def _schema_of(self, array: str) -> Json:
        """Return what the group of an array says of what it holds, None if it does not."""
        group = array.rpartition("/")[0]
        attributes = self._documents.get(f"{group}/{METADATA}".lstrip("/"), {}).get("attributes")
        return attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None

    def _drop(self, key: str, arrays: list[str]) -> None:
        plan = self._plan
        for array in arrays:
            plan.dropped.append(array)
            plan.steps.append(f"leave {array} out: {key} cannot be read")
            self._documents.pop(f"{array}/{METADATA}", None)
            for file in sorted((self._path / array).glob("*")):
                plan.removed.append(file.relative_to(self._path).as_posix())
            for key in [key for key in self._files if array_of(key) == array]:
                del self._files[key]

    def _mend_metadata(self) -> None:
        """Write metadata again that are damaged, too long, or out of date."""
        plan, contents = self._plan, self._contents
        findings = {finding.where: finding for finding in check_metadata(contents)}
        if not contents.metadata:
            plan.hopeless += [f"{where}: {one.what}" for where, one in findings.items()]
        found = {key: read_found(self._path / key)[0] for key in self._documents}
        is_cut = plan.n_rows < contents.n_rows
        rows = [
            document["shape"][0]
            for key, document in found.items()
            if is_per_step(document) and key not in findings
        ]
        is_closed = contents.is_complete or (contents.commit is None and _was_closed(contents))
        length = plan.n_rows if is_cut or is_closed else max([plan.n_rows, *rows])
        final: dict[str, Document] = {}
        for key, document in self._documents.items():
            damaged = key in findings and findings[key].is_damage
            final[key] = document = dict(document if damaged else found[key])
            if is_per_step(document) and (is_cut or is_closed or damaged):
                document["shape"] = [length, *document["shape"][1:]]
        for key, document in final.items():
            self._consolidate(key, document, final, found)
            if not is_same(document, found[key]):
                plan.written[key] = json.dumps(document, indent=2).encode()
                is_declared = is_same(_alone(document), _alone(found[key]))
                how = "consolidate the metadata in {}" if is_declared else "write {} again"
                plan.steps.append(how.format(key))
        self._documents = final

    def _consolidate(
        self,
        key: str,
        document: Document,
        final: dict[str, Document],
        found: dict[str, Document],
    ) -> None:
        """Give a group copies of the metadata below it, where it had some or should have."""
        has_some = found[key].get(_CONSOLIDATED) is not None
        if has_some or (self._contents.is_complete and key == METADATA):
            copies, group = found[key].get(_CONSOLIDATED), array_of(key)
            is_right = not self._plan.dropped and copies_fit(self._path, group, copies, final)
            document[_CONSOLIDATED] = copies if is_right else consolidated_copies(group, final)

    def _mend_bookkeeping(self) -> None:
        """Add lines to the ledger that say what is there, and make the commit record fit it."""
        plan, contents = self._plan, self._contents
        is_cut = plan.n_rows < contents.n_rows
        damaged = not contents.has_whole_ledger
        if is_cut or damaged or self._rebuilt or self._settled or plan.dropped:
            plan.changes_ledger = True
        if plan.changes_ledger and contents.n_rows:
            for entry in self._rebuilt.values():
                plan.lines.append(seal({**entry, "repaired": "rebuilt"}) + b"\n")
            plan.lines.append(seal(self._last_entry()) + b"\n")
            plan.steps.append(f"write {LEDGER} again: its sound lines, and what was repaired")
        elif any(finding.kind == "uncommitted-line" for finding in contents.findings):
            plan.changes_ledger = True
            plan.steps.append(f"cut off what was not committed from {LEDGER}")
        is_wrong = any(finding.kind == "commit-record" for finding in contents.findings)
        if is_wrong or plan.lines:
            plan.changes_commit = True
            plan.steps.append(f"write {COMMIT} again: {plan.n_rows} rows, as the ledger has them")

    def _last_entry(self) -> dict[str, Json]:
        """Return a line for the last block as it is, and for all values as they are."""
        plan, contents = self._plan, self._contents
        first_row = max(row for row in (*contents.lines, *self._rebuilt) if row < plan.n_rows)
        block = self._rebuilt.get(first_row) or contents.entry(contents.lines[first_row][0])
        chunks: dict[str, Json] = dict(block["chunks"])
        files: dict[str, Json] = {
            key: file for key, file in block["files"].items() if array_of(key) in chunks
        }
        for key, record in self._settled.items():
            if key in files:
                files[key] = {"bytes": record.n_bytes}
                chunks[array_of(key)] = contents.entry(record.line)["chunks"][array_of(key)]
        return {
            "rows": (first_row, plan.n_rows),
            "files": {**files, **self._files},
            "chunks": chunks,
            "metadata": {key: _alone(document) for key, document in self._documents.items()},
            "dropped": plan.dropped,
            "repaired": self._of_values,
            "replaces": None
            if contents.commit is None
            else [*msgspec.structs.astuple(contents.commit)],
        }


_CONSOLIDATED = "consolidated_metadata"


def _alone(document: Document) -> Document:
    """Return a document without its copies of others."""
    return {name: value for name, value in document.items() if name != _CONSOLIDATED}


def _file_record(content: bytes) -> FileRecord:
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def _guesses(values: np.ndarray) -> Iterator[tuple[int, float]]:
    """Yield rows and what their values may have been: as they are, or as their neighbours tell."""
    yield 0, values[0]
    if values.dtype != np.float64:
        return
    for row in range(len(values)):
        around = [values[row - 1], values[row - 1] + 1] if row else []
        around += [values[row + 1]] if row + 1 < len(values) else []
        yield from ((row, value) for value in around if value != values[row])


def _index(key: str) -> int:
    """Return the number of a chunk file along the first axis."""
    found = re.search(r"/c\.(\d+)", key)
    assert found is not None
    return int(found[1])


# --- doing it ------------------------------------------------------------------------------------


def _apply(plan: Plan) -> None:
    path, contents = plan.contents.path, plan.contents
    disk = Disk(Stopwatch())
    try:
        for key, content in plan.written.items():
            disk.write(path / key, [content])
        disk.sync((path / key).parent for key in plan.written)
        commit = contents.commit or Commit(n_rows=plan.n_rows, complete=_was_closed(contents))
        if plan.changes_ledger:
            ledger = _Ledger(plan)
            disk.write(path / LEDGER, ledger)
            disk.sync([(path / LEDGER).parent])
            commit = msgspec.structs.replace(
                commit, n_rows=plan.n_rows, ledger_bytes=ledger.n_bytes, ledger_crc32=ledger.crc32
            )
        if plan.changes_commit:
            if not plan.changes_ledger:
                ledger = _Ledger(plan)
                for _ in ledger:
                    pass
                commit = msgspec.structs.replace(
                    commit,
                    n_rows=plan.n_rows,
                    ledger_bytes=ledger.n_bytes,
                    ledger_crc32=ledger.crc32,
                )
            disk.write(path / COMMIT, [commit.to_bytes()])
            disk.sync([(path / COMMIT).parent])
    finally:
        disk.close()
    for key in plan.removed:
        with suppress(FileNotFoundError):
            remove_file(path / key)
    for array in plan.dropped:
        with suppress(OSError):
            os.rmdir(path / array)  # noqa: PTH106


def _was_closed(contents: Contents) -> bool:
    """Whether a store was closed, where its commit record cannot tell."""
    return _CONSOLIDATED in read_found(contents.path / METADATA)[0]


class _Ledger:
    """The new ledger: the sound lines of rows that stay, and those that are added."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.n_bytes = 0
        self.crc32 = 0

    def __iter__(self) -> Iterator[bytes]:
        contents = self._plan.contents
        for line in (
            read_lines(LocalFiles(contents.path), stop=contents.end) if contents.end else ()
        ):
            if line.entry is not None and line.entry.rows[0] < self._plan.n_rows:
                yield self._count(line.content)
        for content in self._plan.lines:
            yield self._count(content)

    def _count(self, content: bytes) -> bytes:
        self.n_bytes += len(content)
        self.crc32 = zlib.crc32(content, self.crc32)
        return content
