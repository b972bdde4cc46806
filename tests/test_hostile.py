"""A store that somebody made to do harm: its reader says what is wrong with it, and no more."""

import ast
import dataclasses
import json
import os
import shutil
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numcodecs import Blosc

import thimble_zarr
from tests.support import stores
from tests.support.faults import everything
from thimble_zarr import tuning
from thimble_zarr.analysis.dataset.open import open_dataset
from thimble_zarr.errors import ConfigError, DamagedStoreError, NotAStoreError, ThimbleError
from thimble_zarr.format import documents
from thimble_zarr.format.documents import MAX_DEPTH
from thimble_zarr.store.coding.shard_codec import ShardFile, decode_vector
from thimble_zarr.store.files.base import read_document
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.integrity.repair import plan_repair, repair
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.ledger import seal, unseal
from thimble_zarr.store.reader import StoreReader

MB = 2**20

MOST_BYTES = 32 * MB
"""Memory that a hostile store may cost."""

COMMIT, LEDGER = ".thimble/commit.json", ".thimble/blocks.jsonl"


@pytest.fixture(scope="module")
def sound(coding: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(f"sound-{coding}") / "run.zarr"
    stores.write_run(path)
    everything(path)  # what is imported and compiled once
    return path


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run.zarr"))


@pytest.fixture(autouse=True)
def _bounded_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    if "data" in request.fixturenames or "only_our_errors" in request.node.name:
        yield  # what Hypothesis takes is no concern of ours
        return
    tracemalloc.start()
    yield
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < MOST_BYTES


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def edit_commit(path: Path, **changes: object) -> None:
    """Change the commit record and give it a good checksum."""
    (path / COMMIT).write_bytes(seal(unseal((path / COMMIT).read_bytes(), dict) | changes))


def read(path: Path) -> None:
    """Read all there is, in all ways there are."""
    everything(path)
    StoreReader.open(path).read_history()
    list(StoreReader.open(path).integrity.altered_chunks((0, 10)))


def refused(path: Path, match: str) -> None:
    with pytest.raises(DamagedStoreError, match=match):
        read(path)
    try:
        assert not verify(path).holds
    except ThimbleError:
        return


# --- what is never run ---------------------------------------------------------------------------


def test_nothing_is_ever_unpickled() -> None:
    package = Path(thimble_zarr.__file__).parent
    for file in [*(package / "format").glob("*.py"), *(package / "interchange").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            names += [getattr(node, "module", None) or ""]
            assert not {"pickle", "marshal", "shelve", "dill"} & set(names), file


@pytest.mark.parametrize("name", ["W", "loss", "count"])
@pytest.mark.parametrize("codec", ["zstd", "gzip", "numcodecs.pickle", "zfpy"])
def test_a_codec_that_no_writer_declares_is_refused(store: Path, name: str, codec: str) -> None:
    def change(array: dict[str, Any]) -> None:
        codecs = array["codecs"]
        codecs = codecs[0]["configuration"]["codecs"] if name == "W" else codecs
        codecs[-2] = {"name": codec}

    edit(store / name / "zarr.json", change)
    refused(store, rf"array {name} .*declares the codec {codec}, and a store has")


@pytest.mark.parametrize("dtype", ["object", "O", "string", "float128", "r64", {"name": "x"}, 7])
def test_a_dtype_that_no_store_has_is_refused(store: Path, dtype: object) -> None:
    edit(store / "count/zarr.json", lambda array: array.update(data_type=dtype))
    refused(store, "array count .*its dtype is")


def test_a_variable_of_another_name_is_refused(store: Path) -> None:
    def change(group: dict[str, Any]) -> None:
        group["attributes"]["thimble"]["dtypes"]["../../elsewhere"] = "float32"

    edit(store / "zarr.json", change)
    refused(store, "is not a variable")


# --- what is never allocated ---------------------------------------------------------------------


@stores.both_codings
@pytest.mark.parametrize(
    "claim",
    [
        {"shape": [10**9, 5]},
        {"shape": [11, 10**9]},
        {"shape": [10**15, 5]},
        {"layout": {"block_steps": 4096, "chunk_tokens": 10**6}},
        {"layout": {"block_steps": 4, "chunk_tokens": 10**8}},
        {"layout": {"block_steps": 10**12, "chunk_tokens": 1}},
    ],
)
def test_a_shape_that_the_files_cannot_hold_is_refused(store: Path, claim: dict[str, Any]) -> None:
    edit(store / "zarr.json", lambda group: group["attributes"]["thimble"].update(claim))
    refused(store, "declares|divide a chunk")


@stores.both_codings
@pytest.mark.parametrize("n_rows", [10**6, 10**15, 2**70])
def test_rows_that_the_files_cannot_hold_are_refused(store: Path, n_rows: int) -> None:
    edit_commit(store, n_rows=n_rows)
    refused(store, "claims .* rows")


def test_a_ledger_that_is_longer_than_its_file_is_refused(store: Path) -> None:
    edit_commit(store, ledger_bytes=2**60)
    refused(store, "not the one that was committed")


@pytest.mark.parametrize(("shape", "chunk"), [(10**12, 10**12), (10**12, 1), (2**31, 2**31 - 17)])
def test_a_label_that_its_file_cannot_hold_is_refused(store: Path, shape: int, chunk: int) -> None:
    def change(array: dict[str, Any]) -> None:
        array["shape"] = [shape]
        array["chunk_grid"]["configuration"]["chunk_shape"] = [chunk]

    edit(store / "text_bytes/zarr.json", change)
    refused(store, "text_bytes")


def chunk_that_claims(n_bytes: int) -> bytes:
    """Return a chunk whose header and checksum are good, and which says it holds so much."""
    encoded = bytearray(Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE).encode(bytes(4096)))
    encoded[4:8] = n_bytes.to_bytes(4, "little")
    return bytes(encoded) + google_crc32c.value(bytes(encoded)).to_bytes(4, "little")


def test_a_chunk_that_claims_more_than_it_can_hold_is_refused() -> None:
    claimed = 2**31 - 17
    with pytest.raises(ValueError, match=f"cannot hold {claimed} bytes in"):
        decode_vector(chunk_that_claims(claimed), claimed, np.dtype("uint8"))
    with pytest.raises(ValueError, match="holds 4096 bytes, not 2147483631"):
        decode_vector(chunk_that_claims(4096), claimed, np.dtype("uint8"))


def test_compressed_bytes_that_are_nonsense_are_an_error_at_worst() -> None:
    """Whoever makes them up can make up their checksum, too."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 50, 600).astype(np.int64)
    sound = Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE).encode(values)
    n_refused = 0
    for _ in range(5000):
        encoded = bytearray(sound)
        for place in rng.integers(0, len(encoded), rng.integers(1, 9)):
            encoded[place] = rng.integers(256)
        content = bytes(encoded) + google_crc32c.value(bytes(encoded)).to_bytes(4, "little")
        try:
            assert len(decode_vector(content, len(values), values.dtype)) == len(values)
        except (ValueError, RuntimeError):
            n_refused += 1
    assert n_refused > 500


# --- what is never opened ------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["W/c.1.0.0", "loss/c.0", "W/zarr.json", COMMIT, LEDGER])
@pytest.mark.parametrize("what", ["link", "pipe", "directory"])
def test_what_is_no_plain_file_is_not_opened(store: Path, key: str, what: str) -> None:
    """A pipe would keep its reader waiting for ever."""
    file, elsewhere = store / key, store.parent / "elsewhere"
    file.rename(elsewhere)
    if what == "link":
        file.symlink_to(elsewhere)
    elif what == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    refused(store, "link|not a plain file|missing or empty|too short|Is a directory")


def test_an_array_that_lies_elsewhere_is_not_read(store: Path) -> None:
    (store / "W").rename(store.parent / "elsewhere")
    (store / "W").symlink_to(store.parent / "elsewhere")
    refused(store, "array W .* link that leads out of the store")


def will_read(reader: StoreReader) -> None:
    with reader.opened() as rows:
        rows.will_read(["W"], (0, 1), range(reader.schema.n_tokens))


def test_nothing_outside_of_the_store_is_opened_to_read_it_ahead(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    enter = ShardFile.__enter__
    monkeypatch.setattr(
        ShardFile, "__enter__", lambda shard: opened.append(shard.key) or enter(shard)
    )
    monkeypatch.setattr(tuning, "TUNING", dataclasses.replace(tuning.TUNING, few_chunks=1))
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", "soon", raising=False)
    will_read(StoreReader.open(store))
    assert len(opened) == 1
    (store / "W").rename(store.parent / "elsewhere")
    (store / "W").symlink_to(store.parent / "elsewhere")
    opened.clear()
    will_read(StoreReader.open(store))
    assert opened == []


def test_a_schema_that_is_a_link_is_not_read(store: Path) -> None:
    (store / "zarr.json").rename(store.parent / "elsewhere")
    (store / "zarr.json").symlink_to(store.parent / "elsewhere")
    with pytest.raises(NotAStoreError):
        StoreReader.open(store)


def rewrite_ledger(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a ledger with good checksums, and a commit record that fits it."""
    content = b"".join(seal(line) + b"\n" for line in lines)
    (path / LEDGER).write_bytes(content)
    edit_commit(path, ledger_bytes=len(content), ledger_crc32=zlib.crc32(content))


def ledger(path: Path) -> list[dict[str, Any]]:
    return [unseal(line, dict) for line in (path / LEDGER).read_bytes().splitlines()]


@pytest.mark.parametrize("key", ["../secret/c.0", "/secret/c.0", "loss/../../secret/c.0"])
def test_a_file_outside_of_the_store_is_not_opened(store: Path, key: str) -> None:
    lines = ledger(store)
    lines[0]["files"][key] = {"bytes": 6, "crc32": 0}
    rewrite_ledger(store, lines)
    refused(store, "has a file .*as no store has")


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["zarr.json", "W/zarr.json", COMMIT])
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"[" * 200 + b"]" * 200,
        b'{"a":' * 100_000,
        b"[" + b"1," * 3_000_000 + b"1]",
        b"9" * 5000,
        b"NaN",
        b"null",
        b"\xff\xfe\x00",
    ],
    ids=["deep", "deep and closed", "deep objects", "many", "digits", "NaN", "null", "no text"],
)
def test_json_that_is_too_much_is_refused(store: Path, key: str, content: bytes) -> None:
    (store / key).write_bytes(content)
    with pytest.raises(ThimbleError):
        read(store)
    try:
        assert not verify(store).holds
    except ThimbleError:
        return


def test_a_document_that_is_too_large_is_not_read(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1000)
    with pytest.raises(ValueError, match="larger than 1,000 bytes"):
        read_document(LocalFiles(store), "W/zarr.json")


def test_attrs_that_no_reader_would_take_are_refused_at_the_start() -> None:
    deep: list[Any] = []
    for _ in range(MAX_DEPTH):
        deep = [deep]
    schema = dataclasses.replace(stores.SCHEMA, attrs={"x": deep})
    with pytest.raises(ConfigError, match=r"attrs\['x'\] .*nested more than"):
        schema.check_json()


# --- fuzz ----------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**62, 2**64, 10**30])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["..", "/", "W", "float32", "uint16", "NaN", "array", "step"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)

DOCUMENTS = ("zarr.json", "W/zarr.json", "loss/zarr.json", "text_end/zarr.json", COMMIT, LEDGER)

IN_SOAK = [pytest.mark.soak] * ("EVERY_KIND" in os.environ)
"""Examples are the same ones each time, so that more are worth their time now and then only."""

OF_PREDICTED = ("W_keyframe/zarr.json", "W_residual/zarr.json", "bias_correction1/zarr.json")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where there is something in a document."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


@pytest.mark.parametrize(
    "coding", [pytest.param(name, marks=IN_SOAK) for name in stores.CODINGS], indirect=True
)
@given(data=st.data())
@settings(
    max_examples=300 if IN_SOAK else 25, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
def test_whatever_the_bookkeeping_says_only_our_errors_come(
    sound: Path, coding: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = Path(shutil.copytree(sound, tmp_path_factory.mktemp("fuzz") / "run.zarr"))
    documents = DOCUMENTS if coding == "plain" else (*OF_PREDICTED, *DOCUMENTS[2:], DOCUMENTS[0])
    key = data.draw(st.sampled_from(documents))
    content = (store / key).read_bytes()
    if key == LEDGER:
        document: Any = ledger(store)
    else:
        document = unseal(content, dict) if key == COMMIT else json.loads(content)
    for _ in range(data.draw(st.integers(1, 3))):
        there = [place for place in places(document) if "consolidated_metadata" not in place]
        put(document, data.draw(st.sampled_from(there)), data.draw(VALUES))
    if key == LEDGER:
        lines = [line for line in document if isinstance(line, dict)]
        rewrite_ledger(store, lines)
    elif key == COMMIT:
        (store / key).write_bytes(seal(document))
    else:
        (store / key).write_text(json.dumps(document))
    for look in (read, verify, plan_repair, open_dataset):
        try:
            look(store)
        except ThimbleError:
            continue
    shutil.rmtree(store.parent)


@pytest.mark.parametrize("names", [[{}], [[]], [None], {}, "step", 7])
def test_axes_that_no_array_has_are_damage(store: Path, names: object) -> None:
    """Where the ledger has its metadata so, too."""
    lines = ledger(store)
    lines[0]["metadata"]["beta2/zarr.json"]["dimension_names"] = names
    rewrite_ledger(store, lines)
    assert not verify(store).holds


def test_a_repair_does_not_write_behind_a_link(store: Path) -> None:
    elsewhere = store.parent / "elsewhere"
    (store / "loss").rename(elsewhere)
    (store / "loss").symlink_to(elsewhere)
    (elsewhere / "c.0").write_bytes(b"mine")
    (elsewhere / "zarr.json").unlink()
    assert plan_repair(store).hopeless == [
        "loss is a link, and is not followed; put back what it stands for"
    ]
    with pytest.raises(ThimbleError, match="cannot repair"):
        repair(store)
    assert (elsewhere / "c.0").read_bytes() == b"mine"
    assert not (elsewhere / "zarr.json").exists()
