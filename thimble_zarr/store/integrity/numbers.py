"""What a repair makes of lost numbers that states are computed from (coding `predicted`).

They cannot become missing: no state of their rows could be computed any more. What torch derived
from other numbers is computed again where the ledger proves that it is the same. Else the store
ends before their rows.
"""

import zlib

import numpy as np

from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.store.coding.predicted import derive
from thimble_zarr.store.coding.shard_codec import decode_vector, encode_vector
from thimble_zarr.store.integrity.files import FileState, compare_file
from thimble_zarr.store.integrity.repair_plan import Plan
from thimble_zarr.store.keys import array_of, chunk_index, split_array_key, vector_key
from thimble_zarr.store.metadata import Declared


def plan_numbers(plan: Plan) -> None:
    """Compute lost numbers again, or end the store before their rows."""
    expected = plan.expected
    for key, declared, first in expected.files_of_arrays(plan.n_rows, sharded=False):
        schema = expected.computes_with(key)
        if schema is None:
            continue
        file = compare_file(expected, key)
        if file.state is not FileState.LOST:
            continue
        content = _computed(plan, schema, key, declared)
        if content is not None and zlib.crc32(content) == file.record.crc32:
            plan.written[key] = content
            plan.steps.append(f"write {key} again: it follows from other numbers")
            continue
        why = f"{key} cannot be read, and the states of its rows are computed from it"
        if first == 0:
            plan.hopeless.append(f"{why}; restore it from a copy")
        elif first < plan.n_rows:
            plan.n_rows = first
            plan.steps.append(f"end the store before row {first}: {why}")


def _computed(plan: Plan, schema: Schema, key: str, declared: Declared) -> bytes | None:
    """Return a file of what torch derived, computed from the numbers that it derived it from."""
    group, name = split_array_key(array_of(key))
    index, length = chunk_index(key), declared.file_shape[0]
    n_rows = min(length, plan.expected.n_rows - index * length)
    if name in schema.scalars:
        return None
    numbers = {of: np.full(n_rows, np.nan) for of in schema.numbers}
    for of in schema.scalars:
        other = vector_key(array_path(group, of), index)
        if compare_file(plan.expected, other).state is FileState.LOST:
            return None
        content = plan.expected.files.get(other)
        numbers[of] = decode_vector(content, length, np.dtype(np.float64))[:n_rows]
    derive(schema, numbers)
    values = np.full(length, declared.fill)
    values[:n_rows] = numbers[name]
    return encode_vector(values)
