"""Metadata documents, and the copies that groups have of them, against what was declared.

What `verify` calls wrong is what differs from the documents that `repair` would write.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from thimble_zarr.errors import DamagedStoreError
from thimble_zarr.format.schema import ATTRIBUTE, Json, Schema
from thimble_zarr.store.integrity.expected import Document, Expected, read_found
from thimble_zarr.store.integrity.result import Discrepancy
from thimble_zarr.store.keys import METADATA, array_of

CONSOLIDATED = "consolidated_metadata"


@dataclass(frozen=True)
class DocumentState:
    """A metadata document as it is, and as it should be.

    Attributes
    ----------
    found, right
        The document on disk, and the one that should be there.
    finding
        How it differs from what was declared, or its copies from the documents; None if they fit.
    """

    found: Document
    right: dict[str, Json]
    finding: Discrepancy | None

    @property
    def is_right(self) -> bool:
        """Whether nothing has to be written."""
        return is_same(self.found, self.right)


def compare_documents(
    expected: Expected, n_rows: int, dropped: Collection[str] = ()
) -> dict[str, DocumentState]:
    """Compare all documents with those of a store of which `n_rows` rows stay.

    Parameters
    ----------
    expected
        What the store should hold.
    n_rows
        Rows that stay.
    dropped
        Arrays that are left out.
    """
    declared = {key: one for key, one in expected.documents.items() if array_of(key) not in dropped}
    found, right, problems, lengths = {}, {}, {}, [n_rows]
    for key, document in declared.items():
        found[key], problem = read_found(expected.files, key)
        if not problem and expected.metadata:
            problem = _difference(expected, found[key], document)
        problems[key] = problem or _misfit(expected, key, document)
        right[key] = dict(document if problems[key] else found[key])
        if is_per_step(right[key]) and not problems[key]:
            lengths.append(right[key]["shape"][0])
    is_trimmed = n_rows < expected.n_rows or was_closed(expected)
    length = n_rows if is_trimmed else max(lengths)
    for key, document in right.items():
        if is_per_step(document) and (is_trimmed or problems[key]):
            document["shape"] = [length, *document["shape"][1:]]
    states = {}
    for key, document in right.items():
        finding = _find_in_copies(expected, key, right, found[key].get(CONSOLIDATED))
        copies = found[key].get(CONSOLIDATED)
        if finding or (copies is not None and dropped):
            copies = _consolidated(_below(array_of(key), right))
        if copies is not None:
            document = document | {CONSOLIDATED: copies}
        if problems[key]:
            repair = "" if expected.metadata else _NOTHING_ELSE
            finding = Discrepancy("metadata", key, problems[key], repair)
        states[key] = DocumentState(found[key], document, finding)
    return states


_NOTHING_ELSE = "none: nothing else tells what was declared; restore it from a copy"


def was_closed(expected: Expected) -> bool:
    """Whether a store was closed, even if its commit record cannot tell."""
    if expected.commit is not None:
        return expected.is_complete
    return CONSOLIDATED in read_found(expected.files, METADATA)[0]


def without_copies(document: Document) -> dict[str, Json]:
    """Return a document without its copies of others."""
    return {name: value for name, value in document.items() if name != CONSOLIDATED}


def is_same(one: object, other: object) -> bool:
    """Whether two JSON values are the same: 1, 1.0 and true are not."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def is_per_step(document: Document) -> bool:
    """Whether the first axis of an array is the steps."""
    names, shape = document.get("dimension_names"), document.get("shape")
    return isinstance(names, list) and "step" in names[:1] and isinstance(shape, list)


def _difference(expected: Expected, found: Document, declared: Document) -> str:
    """Return in what a document differs from the declared one, in more than may change."""
    missing = ()
    for name in sorted((found.keys() | declared.keys()) - {"shape", CONSOLIDATED}):
        if not is_same([found.get(name, missing)], [declared.get(name, missing)]):
            return f"its {name} is not what was declared"
    shape, wanted, n_rows = found.get("shape"), declared.get("shape"), expected.n_rows
    if is_per_step(declared):
        if not (isinstance(shape, list) and shape and type(shape[0]) is int and shape[0] >= n_rows):
            return f"its shape is {shape}, and {n_rows} rows were committed"
        if expected.is_complete and shape[0] != n_rows:
            return f"its shape is {shape}, and the store was closed with {n_rows} rows"
        wanted = [shape[0], *declared["shape"][1:]]
    return "" if is_same(shape, wanted) else f"its shape is {shape}, not {wanted}"


def _misfit(expected: Expected, key: str, document: Document) -> str:
    """Return what is wrong with a document by itself, where the ledger has no copy of it."""
    try:
        if not expected.metadata and key == METADATA:
            attribute = document["attributes"][ATTRIBUTE]
            if "layout" in attribute:
                Schema.from_attribute(attribute)
        elif not expected.metadata and array_of(key) in map(array_of, expected.records):
            expected.declared(array_of(key))
    except (DamagedStoreError, ValueError, LookupError, TypeError) as error:
        return f"it is malformed: {error}"
    return ""


def _find_in_copies(
    expected: Expected, key: str, documents: Mapping[str, Document], copies: object
) -> Discrepancy | None:
    """Find what is wrong with the copies that a group has, which many tools read instead."""
    kind, group = "consolidated-metadata", array_of(key)
    if copies is None:
        if key != METADATA or not expected.is_complete:
            return None
        what = "it has no copy of the arrays' metadata, which other tools read faster"
        return Discrepancy(kind, key, what, is_damage=False)
    others = (one for one in expected.files.list(group) if one.endswith(f"/{METADATA}"))
    if is_same(copies, _consolidated(_below(group, documents))):
        return None
    more = {one: read_found(expected.files, one)[0] for one in others if one not in documents}
    if is_same(copies, _consolidated(_below(group, {**documents, **more}))):
        return None
    if what := _wrong_copy(expected, group, copies):
        return Discrepancy(kind, key, what)
    what = "its copies of the arrays' metadata are out of date"
    return Discrepancy(kind, key, what, is_damage=False)


def _wrong_copy(expected: Expected, group: str, copies: object) -> str:
    """Return which copy in a group is not what was declared, and how."""
    copied = copies.get("metadata") if isinstance(copies, dict) else None
    if not isinstance(copied, dict):
        return "its copies of the arrays' metadata are malformed"
    for path, declared in _below(group, expected.metadata):
        copy = copied.get(path)
        problem = "it is missing"
        if isinstance(copy, dict):
            problem = _difference(expected, copy, declared)
        if problem:
            return f"its copy of the metadata of {path} is wrong: {problem}"
    return ""


def _below(group: str, documents: Mapping[str, Document]) -> Iterator[tuple[str, Document]]:
    """Yield documents below a group, by the paths of what they describe from there."""
    for key, document in documents.items():
        node = array_of(key)
        if node != group and (not group or node.startswith(f"{group}/")):
            yield node.removeprefix(f"{group}/"), document


def _consolidated(documents: Iterator[tuple[str, Document]]) -> dict[str, Json]:
    """Return the copies that a group should have of documents below it, by their paths."""
    copies = {path: without_copies(document) for path, document in documents}
    for copy in copies.values():
        if copy.get("node_type") == "group":
            copy[CONSOLIDATED] = _consolidated(iter(()))
    return {"kind": "inline", "must_understand": False, "metadata": copies}
