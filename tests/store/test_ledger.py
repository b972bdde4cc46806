"""Lines of the ledger."""

import zlib

import pytest

from thimble_zarr.format.documents import MAX_DEPTH, Json
from thimble_zarr.store.ledger import Line, seal


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 10_000])
@pytest.mark.parametrize("place", ["metadata", "unknown"])
def test_a_line_that_is_nested_too_deeply_is_malformed(depth: int, place: str) -> None:
    nested: Json = []
    line = seal({"rows": [0, 1], "files": {}, "chunks": {}, place: {"W/zarr.json": {"a": nested}}})
    deep = line.replace(b"[]", b"[" * depth + b"]" * depth)
    body, _, _ = deep.rpartition(b', "crc32": ')
    sealed = body + b', "crc32": ' + str(zlib.crc32(body)).encode() + b"}\n"
    parsed = Line.parse(0, sealed)
    if place == "unknown" and depth < 1000:
        assert parsed.entry is not None  # what is skipped may be as deep as can be read
    else:
        assert parsed.entry is None
        assert "nested" in parsed.problem
