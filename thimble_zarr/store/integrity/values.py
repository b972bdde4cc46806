"""What a repair makes of files that are no shards: per-step values and labels.

What cannot be read becomes missing or is left out, unless it can be counted: steps and tokens are,
where all were recorded. What was changed by another program is written again where its checksum in
the ledger proves what it was.
"""

import math
from collections.abc import Iterator

import numpy as np

from thimble_zarr.errors import DamagedStoreError
from thimble_zarr.format.schema import ATTRIBUTE, Json, Schema
from thimble_zarr.store.integrity.files import State, compare_file
from thimble_zarr.store.integrity.metadata import is_per_step
from thimble_zarr.store.integrity.plan import Plan, file_record
from thimble_zarr.store.metadata import Declared
from thimble_zarr.store.reader import METADATA, array_of
from thimble_zarr.store.shard import decode_vector, encode_vector

_COUNTED = ("step", "token")
"""Arrays whose values are their own positions, where all of them are recorded."""

_TEXT = ("text_bytes", "text_end")
"""Labels that are of no use without each other."""


def plan_values(plan: Plan) -> None:
    """Keep files of values that can be read; write or leave out those that cannot."""
    for array, declared in list(plan.arrays()):
        if declared.is_sharded:
            continue
        is_long = is_per_step(plan.expected.documents[f"{array}/{METADATA}"])
        length = plan.n_rows if is_long else declared.shape[0]
        for index in range(math.ceil(length / declared.file_shape[0])):
            if array not in plan.dropped:
                _plan_file(plan, f"{array}/c.{index}", declared, index)
    plan.values = {
        key: one for key, one in plan.values.items() if array_of(key) not in plan.dropped
    }


def _plan_file(plan: Plan, key: str, declared: Declared, index: int) -> None:
    expected, array = plan.expected, array_of(key)
    file = compare_file(expected, key)
    record = file.record
    if file.state is State.RECORDED and record is not None and record.crc32 is not None:
        plan.values[key] = {"bytes": record.n_bytes, "crc32": record.crc32}
        plan.changes_ledger |= record.line >= expected.end
        return
    if file.state is State.UNTOLD:
        plan.changes_ledger = True
        plan.steps.append(
            f"keep {key} as it is: its own checksum is right, and the ledger's is lost"
        )
        plan.values[key] = file_record((expected.path / key).read_bytes())
        return
    name, schema = array.rpartition("/")[2], _schema_of(plan, array)
    is_chosen = _is_chosen(name, schema)
    if file.state is State.ALTERED and record is not None and (is_chosen or name not in _COUNTED):
        values = decode_vector(
            (expected.path / key).read_bytes(), declared.file_shape[0], declared.dtype
        )
        missing = np.full_like(values, declared.fill)
        if not np.array_equal(values, missing, equal_nan=True):  # else a repair was cut off here
            plan.values[key] = {"bytes": record.n_bytes, "crc32": record.crc32 or 0}
            if not _restore(plan, key, values, index):
                plan.altered[key] = file.problem
            return
    plan.changes_ledger = True
    if is_chosen:
        plan.hopeless.append(
            f"{key} cannot be read, and nothing else tells which {name}s were recorded; "
            "restore it from a copy"
        )
    elif name in _COUNTED:
        _count(plan, key, declared, index, schema)
    elif is_per_step(expected.documents[f"{array}/{METADATA}"]):
        values = np.full(declared.file_shape[0], declared.fill).astype(declared.dtype)
        start = index * len(values)
        last = min(start + len(values), plan.n_rows) - 1
        why = f"the values of rows {start} to {last} cannot be read, and become missing"
        _write(plan, key, values, why)
    else:
        _drop(plan, key, array.removesuffix(name), _TEXT if name in _TEXT else (name,))


def _write(plan: Plan, key: str, values: np.ndarray, why: str) -> None:
    plan.write(key, encode_vector(values), why)
    plan.values[key] = file_record(plan.written[key])


def _restore(plan: Plan, key: str, values: np.ndarray, index: int) -> bool:
    """Write a file as it was recorded, if its checksum in the ledger proves that.

    What is tried are its values as they are, which may only have been compressed again, and
    with one of them put right.
    """
    for row, value in _guesses(values):
        tried = values.copy()
        tried[row] = value
        content = encode_vector(tried)
        if file_record(content) == plan.values[key]:
            why = "its values are the recorded ones"
            if tried.tobytes() != values.tobytes():
                row += index * len(values)
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


def _schema_of(plan: Plan, array: str) -> Json:
    """Return what the group of an array says of what it holds, None if it does not."""
    group = array.rpartition("/")[0]
    attributes = plan.expected.documents.get(f"{group}/{METADATA}".lstrip("/"), {}).get(
        "attributes"
    )
    return attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None


def _is_chosen(name: str, schema: Json) -> bool:
    """Whether an array labels what was chosen for recording, which nothing else tells."""
    if not isinstance(schema, dict):
        return False
    if name == "step":
        return schema.get("schedule") is not None
    dims = schema.get("dims")
    first = dims[:1] if isinstance(dims, list) else []
    return schema.get("whole_tokens") is not None and first == [name]


def _count(plan: Plan, key: str, declared: Declared, index: int, schema: Json) -> None:
    """Write steps or tokens again, in the order in which they lie on disk."""
    name = array_of(key).rpartition("/")[2]
    order: np.ndarray | range = range(plan.n_rows)
    if name != "step":
        try:
            known = Schema.from_attribute(schema)
        except DamagedStoreError:
            plan.hopeless.append(
                f"{key} cannot be read, and neither can the order of the {name}s; restore it "
                "from a copy"
            )
            return
        order = range(known.n_tokens) if known.stored_order is None else known.stored_order
    values = np.full(declared.file_shape[0], declared.fill).astype(declared.dtype)
    some = order[index * len(values) :][: len(values)]
    values[: len(some)] = some
    _write(plan, key, values, "its values are known")


def _drop(plan: Plan, key: str, group: str, names: tuple[str, ...]) -> None:
    """Leave labels out that cannot be read."""
    for name in names:
        array = group + name
        plan.dropped.append(array)
        plan.steps.append(f"leave {array} out: {key} cannot be read")
        files = sorted((plan.expected.path / array).glob("*"))
        plan.removed += [file.relative_to(plan.expected.path).as_posix() for file in files]
