"""Metadata documents, and the copies that groups have of them, against what was declared.

What `verify` calls wrong is what differs from the documents that `repair` would write.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from thimble_zarr.errors import DamagedStoreError
from thimble_zarr.format.schema import ATTRIBUTE, Schema
from thimble_zarr.store.files.documents import is_chunk_key
from thimble_zarr.store.integrity.expected import Document, Expected, read_found
from thimble_zarr.store.integrity.leftovers import files_below
from thimble_zarr.store.integrity.result import Discrepancy
from thimble_zarr.store.reader import METADATA, array_of

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
    right: Document
    finding: Discrepancy | None


def find_in_metadata(expected: Expected) -> Iterator[Discrepancy]:
    """Find what is wrong with metadata documents and their copies."""
    if not expected.metadata:
        yield from find_undeclared(expected)
        return
    for document in compare_documents(expected, expected.n_rows).values():
        if document.finding:
            yield document.finding


def find_undeclared(expected: Expected) -> Iterator[Discrepancy]:
    """Find what can be found where the ledger has no copy of the metadata."""
    found, problem = read_found(expected.path / METADATA)
    if not problem:
        try:
            attribute = found["attributes"][ATTRIBUTE]
            if "layout" in attribute:
                Schema.from_attribute(attribute)
        except (DamagedStoreError, LookupError, TypeError) as error:
            problem = f"its `{ATTRIBUTE}` attribute is malformed: {error}"
    if problem:
        yield Discrepancy("metadata", METADATA, problem, _NOTHING_ELSE.format("was recorded"))
    problems = {}
    for key in files_below(expected.path):
        place = array_of(key)
        if place and (is_chunk_key(key) or key.endswith(f"/{METADATA}")):
            problems[place] = read_found(expected.path / place / METADATA)[1]
    for array in dict.fromkeys(map(array_of, expected.files)):
        try:
            expected.declared(array)
        except ValueError as error:
            problems[array] = str(error)
    for place, problem in problems.items():
        if problem:
            repair = _NOTHING_ELSE.format("was declared")
            yield Discrepancy("metadata", f"{place}/{METADATA}", problem, repair)


_NOTHING_ELSE = "none: nothing else tells what {}; restore it from a copy"


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
    read = {key: read_found(expected.path / key) for key in declared}
    found = {key: document for key, (document, _) in read.items()}
    problems = {
        key: problem or _difference(expected, found[key], declared[key])
        for key, (_, problem) in read.items()
    }
    right = {key: dict(declared[key] if problems[key] else found[key]) for key in declared}
    per_step = [key for key in declared if is_per_step(right[key]) and right[key].get("shape")]
    is_trimmed = n_rows < expected.n_rows or was_closed(expected)
    lengths = [found[key]["shape"][0] for key in per_step if not problems[key]]
    length = n_rows if is_trimmed else max([n_rows, *lengths])
    for key in per_step:
        if is_trimmed or problems[key]:
            right[key]["shape"] = [length, *right[key]["shape"][1:]]
    states = {}
    for key, document in right.items():
        finding = None
        copies = found[key].get(CONSOLIDATED)
        if copies is not None or (expected.is_complete and key == METADATA):
            finding = _find_in_copies(expected, key, right, copies)
            is_right = not (finding or dropped)
            copies = copies if is_right else _consolidated(_below(array_of(key), right))
            document = document | {CONSOLIDATED: copies}
        if problems[key]:
            finding = Discrepancy("metadata", key, problems[key])
        states[key] = DocumentState(found[key], document, finding)
    return states


def was_closed(expected: Expected) -> bool:
    """Whether a store was closed, even if its commit record cannot tell."""
    if expected.commit is not None:
        return expected.is_complete
    return CONSOLIDATED in read_found(expected.path / METADATA)[0]


def without_copies(document: Document) -> Document:
    """Return a document without its copies of others."""
    return {name: value for name, value in document.items() if name != CONSOLIDATED}


def is_same(found: object, declared: object) -> bool:
    """Whether two JSON values are the same: 1, 1.0 and true are not."""
    if isinstance(declared, dict) and isinstance(found, dict):
        return declared.keys() == found.keys() and all(
            is_same(found[name], declared[name]) for name in declared
        )
    if isinstance(declared, list) and isinstance(found, list):
        return len(found) == len(declared) and all(map(is_same, found, declared))
    return type(found) is type(declared) and found == declared


def is_per_step(document: Document) -> bool:
    """Whether the first axis of an array is the steps."""
    names = document.get("dimension_names")
    return isinstance(names, list) and "step" in names[:1]


def _difference(expected: Expected, found: Document, declared: Document) -> str:
    """Return in what a document differs from the declared one, in more than may change."""
    missing = object()
    for name in sorted((found.keys() | declared.keys()) - {"shape", CONSOLIDATED}):
        if not is_same(found.get(name, missing), declared.get(name, missing)):
            return f"its {name} is not what was declared"
    if "shape" not in declared:
        return "it has a shape" if "shape" in found else ""
    shape, wanted = found.get("shape"), list(declared["shape"])
    if is_per_step(declared):
        n_rows = expected.n_rows
        if not (isinstance(shape, list) and shape and type(shape[0]) is int and shape[0] >= n_rows):
            return f"its shape is {shape}, and {n_rows} rows were committed"
        if expected.is_complete and shape[0] != n_rows:
            return f"its shape is {shape}, and the store was closed with {n_rows} rows"
        wanted[0] = shape[0]
    return "" if is_same(shape, wanted) else f"its shape is {shape}, not {wanted}"


def _find_in_copies(
    expected: Expected, key: str, documents: Mapping[str, Document], copies: object
) -> Discrepancy | None:
    """Find what is wrong with the copies that a group has, which many tools read instead."""
    if copies is not None and _fit(expected.path, array_of(key), copies, documents):
        return None
    what = _wrong_copy(expected, array_of(key), copies)
    is_damage = bool(what) and copies is not None
    if copies is None:
        what = "it has no copy of the arrays' metadata, which other tools read faster"
    what = what or "its copies of the arrays' metadata are out of date"
    return Discrepancy("consolidated-metadata", key, what, is_damage=is_damage)


def _wrong_copy(expected: Expected, group: str, copies: object) -> str:
    """Return which copy in a group is not what was declared, and how."""
    copied = copies.get("metadata") if isinstance(copies, dict) else None
    if not isinstance(copied, dict):
        return "its copies of the arrays' metadata are malformed"
    for path, declared in _below(group, expected.metadata).items():
        copy = copied.get(path)
        problem = "it is missing"
        if isinstance(copy, dict):
            problem = _difference(expected, copy, declared)
        if problem:
            return f"its copy of the metadata of {path} is wrong: {problem}"
    return ""


def _fit(store: Path, group: str, copies: object, documents: Mapping[str, Document]) -> bool:
    """Whether a group's copies are those of documents, and perhaps of others that lie below it."""
    if is_same(copies, _consolidated(_below(group, documents))):
        return True
    others = {
        key: read_found(store / key)[0]
        for key in files_below(store)
        if key.endswith(f"/{METADATA}") and key not in documents
    }
    return is_same(copies, _consolidated(_below(group, {**documents, **others})))


def _below(group: str, documents: Mapping[str, Document]) -> dict[str, Document]:
    """Return documents below a group, by the paths of what they describe from there."""
    return {
        array_of(key).removeprefix(f"{group}/"): document
        for key, document in documents.items()
        if array_of(key) != group and (not group or array_of(key).startswith(f"{group}/"))
    }


def _consolidated(documents: Mapping[str, Document]) -> Document:
    """Return the copies that a group should have of documents below it, by their paths."""
    copies = {path: without_copies(document) for path, document in documents.items()}
    for copy in copies.values():
        if copy.get("node_type") == "group":
            copy[CONSOLIDATED] = _consolidated({})
    return {"kind": "inline", "must_understand": False, "metadata": copies}
