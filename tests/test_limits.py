"""What no reader takes is not written: said when recording starts, before anything is touched."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import stores
from thimble_zarr.analysis.dataset.open import open_dataset
from thimble_zarr.errors import ConfigError, StoreError
from thimble_zarr.format import documents
from thimble_zarr.format.schema import Json, Schema, array_path
from thimble_zarr.store import ledger, metadata
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.keys import BOOKKEEPING, LEDGER
from thimble_zarr.store.ledger import read_lines, seal
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

MOST_BYTES, MOST_ITEMS = 2**19, 2**14
"""What readers of these tests take: less than they do, so that little is written."""

GROUPS = ("a", "b.weight", "日本")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.fixture
def _bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", MOST_BYTES)
    monkeypatch.setattr(ledger, "MAX_LINE_BYTES", MOST_BYTES)
    monkeypatch.setattr(documents, "MAX_ITEMS", MOST_ITEMS)


def run_of(n_parameters: int, attr: Json) -> Schema | dict[str, Schema]:
    schema = replace(stores.SCHEMA, attrs={"x": attr})
    return schema if n_parameters == 1 else dict.fromkeys(GROUPS[:n_parameters], schema)


def refusal(path: Path, schema: Schema | dict[str, Schema]) -> str:
    """Return why a store is not begun; empty if it is, which is undone."""
    try:
        StoreWriter.create(path, schema).discard()
    except ConfigError as error:
        return str(error)
    finally:
        assert not path.exists()
    return ""


def write(path: Path, schema: Schema | dict[str, Schema]) -> None:
    """Record a block and close the store; go on with it for a block more."""
    groups = [*schema] if isinstance(schema, dict) else [""]
    for index, begin in enumerate((StoreWriter.create, StoreWriter.resume)):
        writer = begin(path, schema)
        bits, scalars = stores.block(index), stores.scalars(index * stores.BLOCK_STEPS)
        writer.commit_block(
            writer.n_rows,
            stores.BLOCK_STEPS,
            {array_path(group, name): bits[name].copy() for group in groups for name in bits},
            {array_path(group, name): scalars[name] for group in groups for name in scalars},
        )
        writer.close()


def read(path: Path) -> None:
    """Look at every document and every line."""
    assert verify(path).holds
    for reader in StoreReader.open_each(path):
        assert reader.n_rows == 2 * stores.BLOCK_STEPS
        assert list(reader.integrity.altered_chunks((0, reader.n_rows))) == []
        open_dataset(path, reader.group or None)
    assert all(line.entry is not None for line in read_lines(LocalFiles(path)))


@pytest.mark.usefixtures("_bounded")
@pytest.mark.parametrize("n_parameters", [1, 3])
@pytest.mark.parametrize(
    ("attr_of", "unit", "most"),
    [(lambda n: "x" * n, "bytes", MOST_BYTES), (lambda n: [0] * n, "items", MOST_ITEMS)],
    ids=["bytes", "items"],
)
def test_whatever_is_written_is_read(
    path: Path, attr_of: Callable[[int], Json], unit: str, most: int, n_parameters: int
) -> None:
    """The largest attribute that is taken can be read; of one that is larger nothing is written."""
    size = most - 100 if n_parameters == 1 else most // 2
    while message := refusal(path, run_of(n_parameters, attr_of(size))):
        assert f"at most {MOST_BYTES:,} bytes" in message
        assert "in a file beside the store" in message
        found = re.search(rf"it has .*?([\d,]+) {unit}", message)
        assert found
        size -= -(-(int(found[1].replace(",", "")) - most) // n_parameters)
    assert refusal(path, run_of(n_parameters, attr_of(size + 1)))
    write(path, run_of(n_parameters, attr_of(size)))
    read(path)


@pytest.mark.usefixtures("_bounded")
def test_an_attribute_that_is_too_large_alone_is_named(path: Path) -> None:
    schema = run_of(1, "x" * MOST_BYTES)
    with pytest.raises(ConfigError, match=r"attrs\['x'\] is too large: .*beside the store"):
        StoreWriter.create(path, schema)
    assert not path.exists()


@pytest.mark.usefixtures("_bounded")
def test_what_is_too_large_replaces_nothing(path: Path) -> None:
    stores.write_run(path)
    with pytest.raises(ConfigError, match="too large"):
        StoreWriter.create(path, run_of(3, "x" * (MOST_BYTES // 2)), overwrite=True)
    assert stores.check_rows(path) == stores.N_ROWS


def test_a_line_that_no_reader_takes_is_not_committed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = stores.create(path)
    stores.commit(writer, 4)
    line = (path / LEDGER).read_bytes()
    monkeypatch.setattr(documents, "MAX_ITEMS", 20)
    with pytest.raises(
        StoreError, match=r"line of the ledger cannot be written: .*at most .* 20 i"
    ):
        stores.commit(writer, 8)
    writer.release()
    monkeypatch.undo()
    assert (path / LEDGER).read_bytes() == line
    assert stores.check_rows(path) == 4


def test_a_line_may_be_as_long_as_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in (("MAX_DOCUMENT_BYTES", documents), ("MAX_LINE_BYTES", ledger)):
        monkeypatch.setattr(module, name, 1000)
    lines = []
    for size in range(900, 1000):
        with suppress(StoreError):
            lines.append(seal({"rows": [0, 1], "files": {}, "chunks": {}, "x": "x" * size}) + b"\n")
    assert max(map(len, lines)) == 1000
    assert len(lines) < 100
    (tmp_path / BOOKKEEPING).mkdir()
    (tmp_path / LEDGER).write_bytes(b"".join(lines))
    assert [line.content for line in read_lines(LocalFiles(tmp_path)) if line.entry] == lines


def test_chunks_that_no_reader_takes_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "MAX_CHUNK_BYTES", 4 * 3 * 5 * 4 - 1)  # of `grad`
    with pytest.raises(ConfigError, match="grad would have chunks of 240 bytes, and none has more"):
        stores.create(path)
    assert not path.exists()
