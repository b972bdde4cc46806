"""What a repair makes of files that are no shards: per-step values and labels.

What cannot be read becomes missing or is left out, unless it can be counted: steps and tokens are,
where all were recorded. What was changed by another program is written again where its checksum in
the ledger proves what it was.
"""

import zlib
from collections.abc import Iterator

import numpy as np

from thimble_zarr.format.schema import LABELS, array_path
from thimble_zarr.store.coding.shard_codec import decode_vector, encode_vector
from thimble_zarr.store.integrity.files import Comparison, FileState, compare_file
from thimble_zarr.store.integrity.repair_plan import Plan
from thimble_zarr.store.keys import array_of, chunk_index, metadata_key, split_array_key
from thimble_zarr.store.ledger import FileRecord
from thimble_zarr.store.metadata import Declared, is_of_rows

_TEXT = ("text_bytes", "text_end")
"""Labels that are of no use without each other."""


def plan_values(plan: Plan) -> None:
    """Keep files of values that can be read; write or leave out those that cannot."""
    expected = plan.expected
    files = {
        key: (declared, first, compare_file(expected, key))
        for key, declared, first in expected.files_of_arrays(plan.n_rows, sharded=False)
    }
    for key, (_, _, file) in files.items():
        group, name = split_array_key(array_of(key))
        if file.state is FileState.LOST and name in LABELS and name != "token":
            for label in _TEXT if name in _TEXT else (name,):
                array = array_path(group, label)
                if array not in plan.dropped:
                    plan.dropped.append(array)
                    plan.steps.append(f"leave {array} out: {key} cannot be read")
    for key, (declared, first, file) in files.items():
        if array_of(key) not in plan.dropped:
            _plan_file(plan, key, declared, first, file)


def _plan_file(plan: Plan, key: str, declared: Declared, first: int, file: Comparison) -> None:
    """Plan what becomes of a file that begins with row or label `first`."""
    array, expected = array_of(key), plan.expected
    plan.records[key] = file.record
    if file.state is FileState.RECORDED or key in plan.written:
        return
    if file.state is FileState.UNTOLD:
        plan.steps.append(
            f"keep {key} as it is: its own checksum is right, and the ledger's is lost"
        )
        return
    group, name = split_array_key(array)
    is_long = is_of_rows(expected.documents[metadata_key(array)])
    order = _order(plan, group, name)
    values = np.full(declared.file_shape, declared.fill).astype(declared.dtype)
    if file.state is FileState.ALTERED and order is None:
        found = decode_vector(expected.files.get(key), values.shape, declared.dtype)
        is_missing = is_long and np.array_equal(found, values, equal_nan=True)
        if not is_missing:  # else a repair was cut off here
            _restore(plan, key, found, file)
            return
    stop = first + len(values)
    if order is not None:
        values[: len(order[first:stop])] = order[first:stop]
        why = "its values are known"
    elif is_long and name != "step":
        last = min(stop, plan.n_rows) - 1
        why = f"the values of rows {first} to {last} cannot be read, and become missing"
    else:
        plan.hopeless.append(
            f"{key} cannot be read, and nothing else tells which {name}s were recorded, or in "
            "which order; restore it from a copy"
        )
        return
    content = plan.written[key] = encode_vector(values)
    plan.records[key] = FileRecord(n_bytes=len(content), crc32=zlib.crc32(content))
    plan.steps.append(f"write {key} again: {why}")


def _restore(plan: Plan, key: str, values: np.ndarray, file: Comparison) -> None:
    """Write a file as it was recorded, if its checksum in the ledger proves that, or leave it.

    What is tried are its values as they are, which may only have been compressed again, and
    with one of them put right.
    """
    for row, value in _guesses(values):
        tried = values.copy()
        tried[row] = value
        content = encode_vector(tried)
        if (len(content), zlib.crc32(content)) == (file.record.n_bytes, file.record.crc32):
            why = "its values are the recorded ones"
            if tried.tobytes() != values.tobytes():
                row += chunk_index(key) * len(values)
                why = f"its row {row} is {float(value)} again, and its checksum the recorded one"
            plan.written[key] = content
            plan.steps.append(f"write {key} again: {why}")
            return
    plan.leave(key, file)


def _guesses(values: np.ndarray) -> Iterator[tuple[int, float]]:
    """Yield rows and what their values may have been: as they are, or as their neighbours tell."""
    yield 0, values[0]
    if values.dtype != np.float64 or values.ndim > 1:
        return
    for row in range(len(values)):
        now = values[row].tobytes()  # to NaN beside NaN there is no other
        around = [values[row - 1], values[row - 1] + 1] if row else []
        around += [values[row + 1]] if row + 1 < len(values) else []
        yield from ((row, value) for value in around if value.tobytes() != now)


def _order(plan: Plan, group: str, name: str) -> np.ndarray | range | None:
    """Return all steps or tokens as they lie on disk, None where some were chosen or it is lost."""
    schema = plan.expected.schema(group)
    if schema is None:
        return None
    if name == "step" and schema.schedule is None:
        return range(plan.n_rows)
    if name == "token" and schema.whole_tokens is None:
        return range(schema.n_tokens) if schema.stored_order is None else schema.stored_order
    return None
