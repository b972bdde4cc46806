"""Metadata documents as they should be, and how those on disk differ from them.

What `verify` calls wrong is what differs from the documents that `repair` would write.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from thimble_zarr.store.integrity.expected import Expected, misfit, read_found
from thimble_zarr.store.integrity.verify_result import Discrepancy
from thimble_zarr.store.keys import METADATA, array_of
from thimble_zarr.store.ledger import Document
from thimble_zarr.store.metadata import (
    CONSOLIDATED,
    below,
    consolidated,
    is_of_rows,
    n_items,
    rows_an_item,
)

_NOTHING_ELSE = "none: nothing else tells what was declared; restore it from a copy"


def compare_documents(
    expected: Expected, n_rows: int, dropped: Collection[str] = ()
) -> tuple[dict[str, dict[str, Any]], list[Discrepancy]]:
    """Return the documents of a store of which `n_rows` rows stay, and how it differs from them.

    Arrays that are dropped have none.
    """
    documents = {k: one for k, one in expected.documents.items() if array_of(k) not in dropped}
    found, right, problems, lengths = {}, {}, {}, [n_rows]
    is_declared = bool(expected.ledger.metadata)
    for key, declared in documents.items():
        found[key], problem = read_found(expected.files, key)
        if not problem:
            arguments = expected, found[key], declared
            problem = document_difference(*arguments) if is_declared else misfit(key, declared)
        problems[key], right[key] = problem, without_copies(declared if problem else found[key])
        lengths.append(0 if problem else _length(found[key]) * rows_an_item(found[key]))
    is_trimmed = n_rows < expected.n_rows or was_closed(expected)
    for key, document in right.items():
        if _length(document) and (is_trimmed or problems[key]):
            length = n_items(document, n_rows if is_trimmed else max(lengths))
            right[key] = {**document, "shape": [length, *document["shape"][1:]]}
    findings, whole = [], {}
    for key, document in right.items():
        copies = found[key].get(CONSOLIDATED)
        finding = _find_in_copies(expected, key, right, copies)
        if problems[key]:
            repair = "write it again as it was declared" if is_declared else _NOTHING_ELSE
            findings.append(Discrepancy("metadata", key, problems[key], repair))
        elif finding and is_declared:
            findings.append(finding)
        if finding or (dropped and copies is not None):
            copies = consolidated(array_of(key), right)
        whole[key] = document if copies is None else document | {CONSOLIDATED: copies}
    return whole, findings


def was_closed(expected: Expected) -> bool:
    """Whether a store was closed, even if its commit record cannot tell."""
    if expected.commit is not None:
        return expected.is_complete
    return CONSOLIDATED in read_found(expected.files, METADATA)[0]


def without_copies(document: Document) -> dict[str, Any]:
    """Return a document without its copies of others."""
    return {name: value for name, value in document.items() if name != CONSOLIDATED}


def is_same(one: object, other: object) -> bool:
    """Whether two JSON values are the same: 1, 1.0 and true are not."""
    if repr(one) == repr(other):  # as nearly always, and that is quick to tell
        return True
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _length(document: Document) -> int:
    """Return the length of the first axis where that is the steps, or the blocks, else 0."""
    shape = document.get("shape")
    if not (is_of_rows(document) and isinstance(shape, list) and shape):
        return 0
    return shape[0] if type(shape[0]) is int else 0


def document_difference(expected: Expected, found: Document, declared: Document) -> str:
    """Return in what a document differs from the declared one, in more than may change."""
    for name in sorted((found.keys() | declared.keys()) - {"shape", CONSOLIDATED}):
        if (name in found) != (name in declared) or not is_same(found[name], declared[name]):
            return f"its {name} is not what was declared"
    shape, wanted, length = found.get("shape"), declared.get("shape"), _length(found)
    if _length(declared):
        if length < (least := n_items(declared, expected.n_rows)):
            return f"its shape is {shape}, and {expected.n_rows} rows were committed"
        if expected.is_complete and length != least:
            return f"its shape is {shape}, and the store was closed with {expected.n_rows} rows"
        wanted = [length, *declared["shape"][1:]]
    return "" if is_same(shape, wanted) else f"its shape is {shape}, not {wanted}"


def _find_in_copies(
    expected: Expected, key: str, documents: Mapping[str, Document], copies: object
) -> Discrepancy | None:
    """Find what is wrong with the copies that a group has, which many tools read instead."""
    group, wrong = array_of(key), ""
    what = "its copies of the arrays' metadata are out of date"
    if copies is None:
        if key != METADATA or not expected.is_complete:
            return None
        what = "it has no copy of the arrays' metadata, which other tools read faster"
    elif is_same(copies, consolidated(group, documents)):
        return None
    else:
        keys = [one for one in expected.listed(group) if one.endswith(f"/{METADATA}")]
        others = {one: read_found(expected.files, one)[0] for one in keys if one not in documents}
        if is_same(copies, consolidated(group, {**documents, **others})):
            return None
        wrong = _wrong_copy(expected, group, copies)
    kind, repair = "consolidated-metadata", "consolidate again"
    return Discrepancy(kind, key, wrong or what, repair, is_damage=bool(wrong))


def _wrong_copy(expected: Expected, group: str, copies: object) -> str:
    """Return which copy in a group is not what was declared, and how."""
    copied = copies.get("metadata") if isinstance(copies, dict) else None
    if not isinstance(copied, dict):
        return "its copies of the arrays' metadata are malformed"
    for path, declared in below(group, expected.ledger.metadata):
        copy, problem = copied.get(path), "it is missing"
        if isinstance(copy, dict):
            problem = document_difference(expected, copy, declared)
        if problem:
            return f"its copy of the metadata of {path} is wrong: {problem}"
    return ""
