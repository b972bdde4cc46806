"""What every place must do that a store's files lie in."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import stores
from thimble_zarr.format.overhead import Stopwatch
from thimble_zarr.store.files.base import Files, FileWriter
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.files.memory import MemoryFiles
from thimble_zarr.store.reader import StoreReader

PLACES: dict[str, Callable[[Path], Files]] = {
    "local": lambda path: LocalFiles(path / "new/run.zarr"),
    "memory": lambda path: MemoryFiles(),
}


@pytest.fixture(params=PLACES)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return PLACES[request.param](tmp_path)


@pytest.fixture
def writer(files: Files) -> Iterator[FileWriter]:
    writer = files.writer(Stopwatch())
    yield writer
    writer.close()
    writer.close()


def put(writer: FileWriter, **contents: bytes) -> None:
    for key, content in contents.items():
        writer.put(key.replace("__", "/"), [content])
    writer.sync()


def test_a_place_is_vacant_until_something_is_put_there(files: Files, writer: FileWriter) -> None:
    assert files.is_vacant
    assert not files.is_there
    put(writer, a=b"1")
    assert files.is_there
    assert not files.is_vacant


def test_a_file_has_its_key_once_it_is_synced(files: Files, writer: FileWriter) -> None:
    assert writer.put("a/b/c", iter([b"one", b"", b"two"])) == 6
    writer.settle()
    with pytest.raises(FileNotFoundError):
        files.get("a/b/c")
    writer.sync()
    assert files.get("a/b/c") == b"onetwo"
    assert files.size("a/b/c") == 6
    put(writer, a__b__c=b"three")
    assert files.get("a/b/c") == b"three"
    assert files.get("a/b/c", 2) == b"th"
    assert files.get("a/b/c", 99) == b"three"
    assert [*files.list()] == ["a/b/c"]


def test_what_cannot_be_made_replaces_nothing(files: Files, writer: FileWriter) -> None:
    def parts() -> Iterator[bytes]:
        yield b"new"
        raise ValueError("cannot encode")

    put(writer, a=b"old", b=b"old")
    writer.put("b", [b"new"])
    with pytest.raises(ValueError, match="cannot encode"):
        writer.put("a", parts())
    writer.sync()
    assert (files.get("a"), files.get("b")) == (b"old", b"old")


def test_ranges_of_an_open_file_are_read(files: Files, writer: FileWriter) -> None:
    put(writer, a=b"0123456789")
    memory = bytearray(4)
    with files.open("a") as file:
        assert file.n_bytes == 10
        file.will_read([(0, 3), (5, 5), (8, 99)])
        assert file.read(3, 4) == b"3456"
        assert file.read(8, 4) == b"89"
        assert file.read(10, 4) == b""
        assert file.read_into(memory, 2) == 4
        assert memory == b"2345"
        assert file.read_into(memoryview(memory), 9) == 1
        put(writer, a=b"another")
        assert file.read(0, 10) == b"0123456789"


@pytest.mark.parametrize("ask", [Files.get, Files.open, Files.size])
def test_a_key_without_a_file_is_said_to_have_none(
    files: Files, writer: FileWriter, ask: Callable[[Files, str], object]
) -> None:
    put(writer, a__b=b"1")
    for key in ("c", "c/d", "a/c"):
        with pytest.raises(FileNotFoundError):
            getattr(files, ask.__name__)(key)


def test_keys_are_listed_below_whole_parts(files: Files, writer: FileWriter) -> None:
    put(writer, a__b=b"1", a__c__d=b"2", ab__c=b"3", e=b"4")
    assert sorted(files.list()) == ["a/b", "a/c/d", "ab/c", "e"]
    assert sorted(files.list("a")) == ["a/b", "a/c/d"]
    assert [*files.list("a/c")] == ["a/c/d"]
    assert [*files.list("none")] == []


def test_what_is_appended_ends_a_file(files: Files, writer: FileWriter) -> None:
    put(writer, d__e=b"1")
    writer.append("d/a", 0, b"")
    assert files.get("d/a") == b""
    writer.append("d/a", 0, b"one, ")
    writer.append("d/a", 5, b"two")
    assert files.get("d/a") == b"one, two"
    writer.append("d/a", 5, b"3")
    assert files.get("d/a") == b"one, 3"


def test_files_are_deleted(files: Files, writer: FileWriter) -> None:
    put(writer, a__b=b"1", a__c=b"2", d=b"3")
    writer.delete(["a/b", "gone", "none/gone"])
    assert sorted(files.list()) == ["a/c", "d"]
    writer.delete(iter(["a/c"]))
    assert [*files.list()] == ["d"]
    put(writer, a__b=b"4")
    assert files.get("a/b") == b"4"
    writer.remove()
    assert files.is_vacant


def test_files_travel_to_other_processes(files: Files, writer: FileWriter) -> None:
    put(writer, a=b"1")
    assert pickle.loads(pickle.dumps(files)).get("a") == b"1"


def test_a_store_is_read_wherever_its_files_lie(files: Files, tmp_path: Path) -> None:
    stores.write_run(tmp_path / "run.zarr")
    local = LocalFiles(tmp_path / "run.zarr")
    writer = files.writer()
    for key in local.list():
        writer.put(key, [local.get(key)])
    writer.sync()
    writer.close()
    (reader,) = StoreReader.open_files(files)
    original = StoreReader.open(tmp_path / "run.zarr")
    rows = (0, original.n_rows)
    for name in original.schema.dtypes:
        assert reader.read(name, rows).tobytes() == original.read(name, rows).tobytes()
    assert reader.read_labels().text == original.read_labels().text
    assert list(reader.integrity.altered_chunks(rows)) == []
    assert reader.disk_bytes() == original.disk_bytes()
    assert reader.kind == original.kind
