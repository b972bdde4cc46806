"""What a repair makes of files that are no shards: per-step values and labels.

What cannot be read becomes missing or is left out, unless it can be counted: steps and tokens are,
where all were recorded. What was changed by another program is written again where its checksum in
the ledger proves what it was.
"""

import math
import zlib
from collections.abc import Iterator

import numpy as np

from thimble_zarr.errors import DamagedStoreError
from thimble_zarr.format.schema import ATTRIBUTE, LABELS, Schema
from thimble_zarr.store.integrity.files import FileState, compare_file
from thimble_zarr.store.integrity.plan import Plan
from thimble_zarr.store.keys import (
    array_key,
    array_of,
    chunk_index,
    metadata_key,
    split_array_key,
)
from thimble_zarr.store.ledger import FileRecord
from thimble_zarr.store.metadata import Declared, is_per_step
from thimble_zarr.store.shard import decode_vector, encode_vector

_TEXT = ("text_bytes", "text_end")
"""Labels that are of no use without each other."""


def plan_values(plan: Plan) -> None:
    """Keep files of values that can be read; write or leave out those that cannot."""
    for array, declared in list(plan.arrays()):
        is_long = is_per_step(plan.expected.documents[metadata_key(array)])
        length = plan.n_rows if is_long else declared.shape[0]
        for index in range(math.ceil(length / declared.file_shape[0])):
            if not declared.is_sharded and array not in plan.dropped:
                _plan_file(plan, f"{array}/c.{index}", declared)
    for key in [key for key in plan.records if array_of(key) in plan.dropped]:
        del plan.records[key]


def _plan_file(plan: Plan, key: str, declared: Declared) -> None:
    expected, file = plan.expected, compare_file(plan.expected, key)
    group, name = split_array_key(array_of(key))
    values = np.full(declared.file_shape[0], declared.fill).astype(declared.dtype)
    if file.state is FileState.RECORDED:
        return plan.keep(key, file.record)
    if file.state is FileState.UNTOLD:
        plan.steps.append(
            f"keep {key} as it is: its own checksum is right, and the ledger's is lost"
        )
        return plan.keep(key, file.record)
    order = _order(plan, group, name)
    if file.state is FileState.ALTERED and order is None:
        found = decode_vector(expected.files.get(key), len(values), declared.dtype)
        if not np.array_equal(found, values, equal_nan=True):  # else a repair was cut off here
            plan.keep(key, file.record)
            if not _restore(plan, key, found, file.record):
                plan.altered[key] = file.problem
            return None
    plan.changes_ledger = True
    start = chunk_index(key) * len(values)
    if order is not None:
        some = order[start : start + len(values)]
        values[: len(some)] = some
        plan.write(key, encode_vector(values), "its values are known")
    elif name != "step" and is_per_step(expected.documents[metadata_key(array_of(key))]):
        last = min(start + len(values), plan.n_rows) - 1
        why = f"the values of rows {start} to {last} cannot be read, and become missing"
        plan.write(key, encode_vector(values), why)
    elif name in LABELS and name != "token":
        for label in _TEXT if name in _TEXT else (name,):
            array = array_key((group, label))
            plan.dropped.append(array)
            plan.removed += expected.files.list(array)
            plan.steps.append(f"leave {array} out: {key} cannot be read")
    else:
        plan.hopeless.append(
            f"{key} cannot be read, and nothing else tells which {name}s were recorded, or in "
            "which order; restore it from a copy"
        )


def _restore(plan: Plan, key: str, values: np.ndarray, record: FileRecord) -> bool:
    """Write a file as it was recorded, if its checksum in the ledger proves that.

    What is tried are its values as they are, which may only have been compressed again, and
    with one of them put right.
    """
    for row, value in _guesses(values):
        tried = values.copy()
        tried[row] = value
        content = encode_vector(tried)
        if (len(content), zlib.crc32(content)) == (record.n_bytes, record.crc32):
            why = "its values are the recorded ones"
            if tried.tobytes() != values.tobytes():
                row += chunk_index(key) * len(values)
                why = f"its row {row} is {float(value)} again, and its checksum the recorded one"
            plan.write(key, content, why)
            return True
    return False


def _guesses(values: np.ndarray) -> Iterator[tuple[int, float]]:
    """Yield rows and what their values may have been: as they are, or as their neighbours tell."""
    yield 0, values[0]
    if values.dtype != np.float64:
        return
    for row in range(len(values)):
        around = [values[row - 1], values[row - 1] + 1] if row else []
        around += [values[row + 1]] if row + 1 < len(values) else []
        yield from ((row, value) for value in around if value != values[row])


def _order(plan: Plan, group: str, name: str) -> np.ndarray | range | None:
    """Return all steps or tokens as they lie on disk, None where some were chosen or it is lost."""
    try:
        document = plan.expected.documents[metadata_key(group)]
        schema = Schema.from_attribute(document["attributes"][ATTRIBUTE])
    except (DamagedStoreError, LookupError, TypeError):
        return None
    if name == "step" and schema.schedule is None:
        return range(plan.n_rows)
    if name == "token" and schema.whole_tokens is None:
        return range(schema.n_tokens) if schema.stored_order is None else schema.stored_order
    return None
