"""The contract on disk, read back by ourselves, by TensorStore and by plain xarray."""

import dataclasses
import json
import os
import random
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray as xr

from tests.support import stores
from tests.support.runs import N_LIVE, N_STEPS, N_TOKENS, History, token_labels
from tests.support.stores import BLOCK_STEPS, block, both_codings, scalars
from thimble_zarr.bits import decode
from thimble_zarr.errors import (
    DamagedStoreError,
    NotAStoreError,
    StoreError,
    StoreExistsError,
    StoreLockedError,
    UnsupportedFormatError,
)
from thimble_zarr.format import layout
from thimble_zarr.store import writer as writer_module
from thimble_zarr.store.files.disk import LocalWriter
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.keys import LEDGER
from thimble_zarr.store.ledger import MAX_LINE_BYTES, read_last_line, seal
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter


def write_blocks(writer: StoreWriter, n_blocks: int, *, last_rows: int = BLOCK_STEPS) -> None:
    for index in range(n_blocks):
        n_rows = last_rows if index == n_blocks - 1 else BLOCK_STEPS
        writer.commit_block(index * BLOCK_STEPS, n_rows, block(index), scalars(index * BLOCK_STEPS))


@pytest.fixture
def writer(coding: str, tmp_path: Path) -> StoreWriter:
    return StoreWriter.create(
        tmp_path / "run.zarr", stores.SCHEMA, labels=token_labels(), n_rows=10
    )


@pytest.fixture
def path(writer: StoreWriter) -> Path:
    """A closed store of two full blocks and one of two rows."""
    write_blocks(writer, 3, last_rows=2)
    writer.close()
    return writer.path


@both_codings
def test_what_was_committed_is_read_back(path: Path) -> None:
    reader = StoreReader.open(path)
    assert reader.n_rows == 10
    assert reader.schema == stores.SCHEMA
    for name in stores.SCHEMA.dtypes:
        expected = np.concatenate([block(index)[name] for index in range(3)])
        np.testing.assert_array_equal(reader.read(name, (0, 10)), expected[:10])
        part = reader.read(name, (3, 9), range(2, 7))
        np.testing.assert_array_equal(part, expected[3:9, 2:7])
    for name, values in reader.read_numbers().items():
        np.testing.assert_array_equal(values, scalars(0, 10)[name])


def test_labels_are_read_back(path: Path) -> None:
    labels, expected = StoreReader.open(path).read_labels(), token_labels()
    assert list(labels.text) == list(expected.text)
    for name in ("count", "live", "dead"):
        np.testing.assert_array_equal(getattr(labels, name), getattr(expected, name))


def test_a_discarded_store_is_gone_and_its_path_free(tmp_path: Path, writer: StoreWriter) -> None:
    write_blocks(writer, 2)
    writer.discard()
    assert list(tmp_path.iterdir()) == []
    StoreWriter.create(tmp_path / "run.zarr", stores.SCHEMA).release()


def test_texts_may_be_empty_and_unicode(tmp_path: Path) -> None:
    texts = ["", "ä", "日本", "\0", " ", "", "x", "\n", "🙂", "e\u0301", ""]
    labels = dataclasses.replace(token_labels(), text=texts)
    StoreWriter.create(tmp_path / "run.zarr", stores.SCHEMA, labels=labels).release()
    assert StoreReader.open(tmp_path / "run.zarr").read_labels().text == texts


def test_unknown_labels_are_left_out(tmp_path: Path) -> None:
    StoreWriter.create(tmp_path / "run.zarr", stores.SCHEMA).release()
    labels = StoreReader.open(tmp_path / "run.zarr").read_labels()
    assert labels == type(labels)()


def test_tensorstore_reads_the_same_bits(toy_path: Path, toy_history: History) -> None:
    reader = StoreReader.open(toy_path)
    for name, native in reader.schema.dtypes.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(toy_path / name)}}
        bits = tensorstore.open(spec, read=True).result().read().result()
        bits = np.asarray(bits)[:, reader.schema.places]
        np.testing.assert_array_equal(bits, reader.read(name, (0, reader.n_rows)))
        np.testing.assert_array_equal(decode(bits, native, np.float64), toy_history[name])


def test_plain_xarray_opens_it(toy_path: Path) -> None:
    ds = xr.open_zarr(toy_path)
    assert ds.W.dims == ("step", "token", "dim")
    assert ds.step.values.tolist() == list(range(N_STEPS + 1))
    assert sorted(ds.token.values.tolist()) == list(range(N_TOKENS))
    assert ds.dead.values.tolist() == [False] * N_LIVE + [True] * (N_TOKENS - N_LIVE)
    bits = StoreReader.open(toy_path).read("W", (0, N_STEPS + 1))
    np.testing.assert_array_equal(ds.W.sel(token=np.arange(N_TOKENS)).values, bits)
    labels = token_labels()
    by_id = ds.sortby("token")
    for name in ("count", "live", "dead"):
        np.testing.assert_array_equal(by_id[name], getattr(labels, name))
    assert ds.W.attrs["dtype"] == "bfloat16"
    assert "<< 16" in ds.W.attrs["encoding"]


def test_plain_xarray_opens_it_while_it_is_written(writer: StoreWriter) -> None:
    write_blocks(writer, 1)
    ds = xr.open_zarr(writer.path, consolidated=False)
    np.testing.assert_array_equal(ds.grad[:BLOCK_STEPS], block(0)["grad"])
    assert np.isnan(ds.grad[BLOCK_STEPS:].values).all()
    assert np.isnan(decode(ds.W[BLOCK_STEPS:].values, "bfloat16")).all()
    assert (ds.step[BLOCK_STEPS:] == -1).all()


@both_codings
def test_readers_see_committed_rows_only(writer: StoreWriter) -> None:
    assert StoreReader.open(writer.path).n_rows == 0
    write_blocks(writer, 1)
    reader = StoreReader.open(writer.path)
    write_blocks(writer, 2)
    assert reader.n_rows == BLOCK_STEPS
    np.testing.assert_array_equal(reader.read("W", (0, BLOCK_STEPS)), block(0)["W"])
    assert StoreReader.open(writer.path).n_rows == 2 * BLOCK_STEPS
    assert not reader.commit.complete


@both_codings
def test_a_short_block_may_be_committed_again_with_more_rows(writer: StoreWriter) -> None:
    writer.commit_block(0, 1, block(0), scalars(0))
    assert StoreReader.open(writer.path).n_rows == 1
    writer.commit_block(0, 3, block(0), scalars(0))
    early = StoreReader.open(writer.path)
    np.testing.assert_array_equal(early.read("W", (0, 3)), block(0)["W"][:3])
    np.testing.assert_array_equal(early.read_scalars()["loss"], [0, 1, 2])
    writer.commit_block(0, 4, block(0), scalars(0))
    for reader in (early, StoreReader.open(writer.path)):
        rows = reader.n_rows
        np.testing.assert_array_equal(reader.read("W", (0, rows)), block(0)["W"][:rows])


def test_a_block_that_is_none_is_refused(writer: StoreWriter) -> None:
    write_blocks(writer, 2)
    for first_row, n_rows in ((3, BLOCK_STEPS), (BLOCK_STEPS, 1), (0, BLOCK_STEPS)):
        with pytest.raises(StoreError, match="do not continue the last block"):
            writer.commit_block(first_row, n_rows, block(0), scalars(0))


def test_a_gap_is_refused(writer: StoreWriter) -> None:
    with pytest.raises(StoreError, match="rows 0 to 3 were never committed"):
        writer.commit_block(BLOCK_STEPS, BLOCK_STEPS, block(0), scalars(0))


def test_the_store_grows_beyond_what_was_declared(tmp_path: Path) -> None:
    writer = StoreWriter.create(tmp_path / "run.zarr", stores.SCHEMA)
    write_blocks(writer, 7, last_rows=3)
    writer.close()
    reader = StoreReader.open(writer.path)
    assert reader.n_rows == 27
    assert xr.open_zarr(writer.path).sizes["step"] == 27
    np.testing.assert_array_equal(reader.read("W", (24, 27)), block(6)["W"][:3])
    np.testing.assert_array_equal(reader.read_scalars()["loss"], np.arange(27))


def test_scalars_go_on_in_the_next_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SCALAR_CHUNK_STEPS", 2 * BLOCK_STEPS)
    writer = StoreWriter.create(tmp_path / "run.zarr", stores.SCHEMA)
    write_blocks(writer, 5, last_rows=1)
    writer.close()
    np.testing.assert_array_equal(StoreReader.open(writer.path).read_scalars()["eps"], range(17))
    assert sorted(file.name for file in (writer.path / "eps").glob("c.*")) == ["c.0", "c.1", "c.2"]


@both_codings
def test_a_block_of_missing_values_is_written_all_the_same(writer: StoreWriter) -> None:
    missing = {
        name: np.full_like(bits, 0x7FC0 if bits.dtype == np.uint16 else np.nan)
        for name, bits in block(0).items()
    }
    writer.commit_block(0, BLOCK_STEPS, missing, scalars(0))
    for name, bits in missing.items():
        found = StoreReader.open(writer.path).read(name, (0, BLOCK_STEPS))
        np.testing.assert_array_equal(found, bits)


@both_codings
def test_a_commit_goes_to_disk_in_order(
    writer: StoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"sync {target.relative_to(writer.path)}")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append(f"rename {target.relative_to(writer.path)}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_blocks(writer, 1)

    def at(event: str) -> int:
        return events.index(event)

    names = (*stores.SCHEMA.arrays, *stores.SCHEMA.per_step)
    files = [event for event in events if event.startswith("sync") and "c.0" in event]
    renames = [event for event in events if event.startswith("rename") and "c.0" in event]
    assert len(files) == len(renames) == len(names)
    # What the ledger promises is on disk before any file has its name.
    assert max(map(at, files)) < at("sync .thimble/blocks.jsonl") < min(map(at, renames))
    assert max(map(at, renames)) < min(at(f"sync {name}") for name in names)
    assert max(at(f"sync {name}") for name in names) < at("sync .thimble/commit.json.partial")
    assert events[-2:] == ["rename .thimble/commit.json", "sync .thimble"]


@both_codings
def test_the_ledger_knows_every_file(path: Path) -> None:
    ledger = (path / ".thimble/blocks.jsonl").read_bytes()
    commit = StoreReader.open(path).commit
    assert len(ledger) == commit.ledger_bytes
    assert zlib.crc32(ledger) == commit.ledger_crc32
    entries = [json.loads(line) for line in ledger.splitlines()]
    assert [entry["rows"] for entry in entries] == [[0, 4], [4, 8], [8, 10]]
    files = {key: entry for line in entries for key, entry in line["files"].items()}
    on_disk = {
        str(file.relative_to(path)): {"bytes": file.stat().st_size}
        # Chunks of the big arrays have checksums of their own.
        | (
            {}
            if file.parent.name in stores.SCHEMA.arrays
            else {"crc32": zlib.crc32(file.read_bytes())}
        )
        for file in path.glob("*/c.*")
    }
    assert files == on_disk
    assert {"grad/c.0.0.0", "loss/c.0", "token/c.0"} <= set(files)


def test_nothing_temporary_is_left(path: Path) -> None:
    assert not list(path.rglob("*.partial"))


@pytest.mark.parametrize("damage", ["unlink", "empty"])
@pytest.mark.parametrize("name", ["W/c.1.0.0", "loss/c.0", "text_end/c.0"])
def test_a_missing_or_empty_file_is_an_error(path: Path, name: str, damage: str) -> None:
    if damage == "unlink":
        (path / name).unlink()
    else:
        (path / name).write_bytes(b"")
    reader = StoreReader.open(path)
    read = {
        "W": lambda: reader.read("W", (3, 5)),
        "loss": reader.read_scalars,
        "text_end": reader.read_labels,
    }
    with pytest.raises(DamagedStoreError, match=name):
        read[Path(name).parent.name]()


def test_a_flipped_byte_is_an_error_and_never_a_wrong_number(path: Path) -> None:
    file = path / "W/c.0.0.0"
    sound, expected = file.read_bytes(), block(0)["W"]
    for offset in random.Random(0).sample(range(len(sound)), 60):
        file.write_bytes(sound[:offset] + bytes([sound[offset] ^ 0x10]) + sound[offset + 1 :])
        try:
            bits = StoreReader.open(path).read("W", (0, BLOCK_STEPS))
        except DamagedStoreError:
            continue
        np.testing.assert_array_equal(bits, expected)


def test_a_truncated_file_is_an_error(path: Path) -> None:
    file = path / "W/c.0.0.0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedStoreError, match="cannot decode W from step 0 on"):
        StoreReader.open(path).read("W", (0, BLOCK_STEPS))


@pytest.mark.parametrize("name", ["W", "loss"])
def test_an_array_that_is_shorter_than_the_commit_says_is_damage(path: Path, name: str) -> None:
    metadata = json.loads((path / name / "zarr.json").read_text())
    metadata["shape"][0] = 5
    (path / name / "zarr.json").write_text(json.dumps(metadata))
    reader = StoreReader.open(path)
    with pytest.raises(DamagedStoreError, match=rf"the array {name} has shape \(5,"):
        {"W": lambda: reader.read("W", (3, 10)), "loss": reader.read_scalars}[name]()


def test_a_store_that_cannot_be_created_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalWriter, "put", no_space)
    with pytest.raises(StoreError, match=r"cannot create a store at .*: No space left"):
        StoreWriter.create(tmp_path / "run.zarr", stores.SCHEMA)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    StoreWriter.create(tmp_path / "run.zarr", stores.SCHEMA).close()


def test_what_is_no_store_is_refused(tmp_path: Path, path: Path) -> None:
    with pytest.raises(NotAStoreError, match="there is nothing at"):
        StoreReader.open(tmp_path / "absent")
    (tmp_path / "file").write_text("hello")
    (tmp_path / "directory").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/zarr.json").write_text('{"attributes": {}}')
    for name in ("file", "directory", "other"):
        with pytest.raises(NotAStoreError, match="not a thimble-zarr store"):
            StoreReader.open(tmp_path / name)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_newer_format_is_refused(path: Path) -> None:
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"]["thimble"]["format_version"] = 9
    (path / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(UnsupportedFormatError, match=r"run\.zarr: it has format version 9"):
        StoreReader.open(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1, "n_rows": -1}', "null"])
def test_a_malformed_commit_record_is_damage(path: Path, content: str) -> None:
    (path / ".thimble/commit.json").write_text(content)
    with pytest.raises(DamagedStoreError, match="commit record"):
        StoreReader.open(path)


def test_a_taken_path_is_refused_and_kept(path: Path) -> None:
    with pytest.raises(StoreExistsError, match="already holds a recorded run"):
        StoreWriter.create(path, stores.SCHEMA)
    assert StoreReader.open(path).n_rows == 10


def test_overwriting_replaces_a_store(path: Path) -> None:
    writer = StoreWriter.create(path, stores.SCHEMA, overwrite=True)
    assert StoreReader.open(path).n_rows == 0
    write_blocks(writer, 1)
    writer.close()
    assert StoreReader.open(path).n_rows == BLOCK_STEPS
    assert not (path / "live").exists()


def test_overwriting_never_removes_anything_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(StoreExistsError, match="never overwritten"):
        StoreWriter.create(tmp_path, stores.SCHEMA, overwrite=True)
    with pytest.raises(StoreExistsError, match="never overwritten"):
        StoreWriter.create(tmp_path / "thesis.tex", stores.SCHEMA, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"


def test_an_empty_directory_will_do(tmp_path: Path) -> None:
    write_blocks(StoreWriter.create(tmp_path, stores.SCHEMA), 1)
    assert StoreReader.open(tmp_path).n_rows == BLOCK_STEPS


def test_the_loser_of_a_race_removes_nothing(
    writer: StoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second writer that saw the path vacant, before the first one took it."""
    write_blocks(writer, 1)
    monkeypatch.setattr(writer_module, "check_vacant", lambda path, overwrite: None)
    with pytest.raises(StoreLockedError):
        StoreWriter.create(writer.path, stores.SCHEMA)
    assert StoreReader.open(writer.path).n_rows == BLOCK_STEPS
    writer.close()
    with pytest.raises(StoreExistsError, match="was just recorded"):
        StoreWriter.create(writer.path, stores.SCHEMA)
    assert StoreReader.open(writer.path).n_rows == BLOCK_STEPS


def test_labels_are_kept_as_masks(tmp_path: Path) -> None:
    integers = np.array([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    labels = writer_module.TokenLabels(dead=integers)
    write_blocks(StoreWriter.create(tmp_path / "run.zarr", stores.SCHEMA, labels=labels), 1)
    dead = StoreReader.open(tmp_path / "run.zarr").read_labels().dead
    assert dead.dtype == bool
    assert np.flatnonzero(dead).tolist() == [1, 10]


def test_a_store_that_is_being_written_is_not_overwritten(writer: StoreWriter) -> None:
    write_blocks(writer, 1)
    with pytest.raises(StoreLockedError, match=rf"process {os.getpid()} on .* is recording"):
        StoreWriter.create(writer.path, stores.SCHEMA, overwrite=True)
    assert StoreReader.open(writer.path).n_rows == BLOCK_STEPS


@pytest.mark.parametrize("below", ["file/run.zarr", "file"])
def test_an_unwritable_path_is_a_clear_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((StoreError, StoreExistsError), match="file"):
        StoreWriter.create(tmp_path / below, stores.SCHEMA)


def test_a_reader_pickles_small(path: Path) -> None:
    import pickle

    reader = StoreReader.open(path)
    reader.read("W", (0, 1))
    pickled = pickle.dumps(reader)
    assert len(pickled) < 2000
    np.testing.assert_array_equal(pickle.loads(pickled).read("W", (0, 9)), reader.read("W", (0, 9)))


def ledger_at(path: Path) -> tuple[LocalFiles, Path]:
    (path / LEDGER).parent.mkdir()
    return LocalFiles(path), path / LEDGER


def test_the_last_line_of_a_ledger_is_found_from_its_end(tmp_path: Path) -> None:
    files, file = ledger_at(tmp_path)
    lines = [seal({"rows": [0, n], "files": {}, "chunks": {}}) + b"\n" for n in range(1, 4)]
    lines.insert(1, seal({"rows": [0, 9], "files": {"x": {"bytes": 1}}, "chunks": {}}) + b"\n")
    lines[1] = lines[1].replace(b"}\n", b" " * 200_000 + b"}\n")  # longer than is read at once
    file.write_bytes(b"".join(lines))
    stop = 0
    assert read_last_line(files, 0) is None
    for line in lines:
        start, stop = stop, stop + len(line)
        found = read_last_line(files, stop)
        assert found is not None
        assert (found.start, found.content) == (start, line)
    assert read_last_line(files, 10**9) == found
    torn = read_last_line(files, stop - 1)
    assert torn is not None
    assert torn.entry is None


def test_a_ledger_of_no_lines_costs_no_more_than_the_longest_line(tmp_path: Path) -> None:
    files, file = ledger_at(tmp_path)
    file.touch()
    os.truncate(file, 2**32)
    tracemalloc.start()
    line = read_last_line(files, 2**32)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert line is not None
    assert line.entry is None
    assert most < 5 * MAX_LINE_BYTES
