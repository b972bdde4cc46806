"""The page that specifies the format is enough to read a store, and names all that is in one."""

import ast
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import torch
import zarr

import thimble_zarr
from tests.support.documents import ROOT, blocks, in_code
from tests.support.runs import Loop, record
from tests.support.stores import create, write_run
from tests.support.zoo import SHAPES, Recorded
from thimble_zarr import Recorder, every, windows
from thimble_zarr.format.schema import Schema
from thimble_zarr.store.integrity.repair import repair

PAGE = ROOT / "docs/format.md"

(SOURCE,) = (
    block.content
    for block in blocks(PAGE.read_text(encoding="utf-8"))
    if "def read_array" in block.content
)
"""The reader that the page has."""


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page defines."""
    names: dict[str, Any] = {}
    exec(SOURCE, names)
    return names


def patterns(values: np.ndarray) -> np.ndarray:
    """The bits of numbers, so that NaN is compared too."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def assert_reads_the_same(page: dict[str, Any], store: Path, parameter: str = "") -> None:
    ds = thimble_zarr.open_dataset(store, parameter=parameter or None)
    schema = Schema.from_attribute(page["read_attribute"](store / parameter))
    assert page["read_commit"](store)["n_rows"] == ds.sizes["step"]
    for name in schema.dtypes:
        found = page["read_array"](store, name, parameter).astype(np.float32)
        np.testing.assert_array_equal(patterns(found), patterns(ds[name].values))
    steps = page["read_vector"](store / parameter / "step", ds.sizes["step"])
    np.testing.assert_array_equal(steps, ds.step.values)
    rates = page["read_vector"](store / parameter / "learning_rate", ds.sizes["step"])
    np.testing.assert_array_equal(rates, ds.learning_rate.values)


OPTIONS: dict[str, dict[str, Any]] = {
    "dead last": {},
    "nothing known of tokens": {"recorder_options": {"labels": None}},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16, "eps": 1e-4},
    "amsgrad": {"amsgrad": True},
    "a schedule": {"recorder_options": {"schedule": every(5) | windows((1, 3))}},
    "some tokens": {"recorder_options": {"tokens": [9, 1, 4, 5]}},
    "some variables": {"recorder_options": {"variables": ("W", "exp_avg")}},
    "predicted": {"recorder_options": {"coding": "predicted"}},
    "predicted, a last block of one row": {
        "recorder_options": {"coding": "predicted"},
        "n_steps": 12,
    },
    "predicted, no weight decay": {"recorder_options": {"coding": "predicted"}, "weight_decay": 0},
    "predicted, from the far end": {
        "recorder_options": {"coding": "predicted"},
        "betas": (0.4, 0.99),
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_reader_of_the_page_reads_a_run(
    page: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    record(tmp_path / "run.zarr", **options)
    assert_reads_the_same(page, tmp_path / "run.zarr")
    *_, line = page["read_ledger"](tmp_path / "run.zarr")
    assert line["rows"][1] == page["read_commit"](tmp_path / "run.zarr")["n_rows"]


def record_what_is_not_predicted(path: Path) -> None:
    """A step that is skipped, and weights that something else than the optimizer moved."""
    loop, options = Loop(), {"memory_bytes": 8000, "coding": "predicted"}
    with Recorder(path, loop.optimizer, parameter=loop.weight, **options) as recorder:
        for step in range(1, 14):
            loop.backward()
            if step == 6:
                loop.weight.grad = None
            loop.optimizer.step()
            if step == 9:
                with torch.no_grad():
                    loop.weight[3, 2] += 1
            loop.optimizer.zero_grad()
            recorder.log(loss=1.0)


@pytest.mark.filterwarnings("ignore:no gradient at step 6")
def test_it_decodes_what_no_program_predicts(page: dict[str, Any], tmp_path: Path) -> None:
    record_what_is_not_predicted(tmp_path / "run.zarr")
    assert_reads_the_same(page, tmp_path / "run.zarr")
    ds = thimble_zarr.open_dataset(tmp_path / "run.zarr")
    np.testing.assert_array_equal(ds.W[6], ds.W[5])
    assert float(ds.W[10, 3, 2] - ds.W[9, 3, 2]) > 0.5


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not")
def test_zarr_reads_the_gradient_of_an_archive(toy_path: Path, tmp_path: Path) -> None:
    (reader,) = thimble_zarr.recode(toy_path, tmp_path / "archive.zarr", archive=True)
    grad = zarr.open_array(tmp_path / "archive.zarr" / "grad", mode="r")
    sharding = grad.metadata.to_dict()["codecs"][0]["configuration"]
    assert sharding["codecs"][1]["name"] == "numcodecs.pcodec"
    recorded = reader.read("grad", (0, reader.n_rows))
    order = reader.schema.stored_order
    np.testing.assert_array_equal(grad[...], recorded if order is None else recorded[:, order])


@pytest.mark.parametrize("fault", ["a number of the step", "another formula"])
def test_it_sees_what_was_decoded_wrong(
    page: dict[str, Any], toy_path: Path, tmp_path: Path, fault: str
) -> None:
    store = tmp_path / "small.zarr"
    thimble_zarr.recode(toy_path, store, coding="predicted")
    if fault == "another formula":
        source = SOURCE.replace("np.sqrt(v)", "np.sqrt(v * 2)")
        assert source != SOURCE
        page = {}
        exec(source, page)
    else:  # another array with sound checksums of its own
        shutil.copy(store / "beta1/c.0", store / "beta2/c.0")
    with pytest.raises(ValueError, match="does not match"):
        page["read_array"](store, "W")


def test_what_it_cannot_read_it_refuses(page: dict[str, Any], tmp_path: Path) -> None:
    options = {"recorder_options": {"coding": "predicted"}, "dtype": torch.float32}
    record(tmp_path / "run.zarr", **options)
    with pytest.raises(NotImplementedError, match="float32"):
        page["read_array"](tmp_path / "run.zarr", "W")
    assert len(page["read_array"](tmp_path / "run.zarr", "grad")) == 14


@pytest.mark.parametrize("name", SHAPES)
def test_it_reads_several_parameters(page: dict[str, Any], zoo: Recorded, name: str) -> None:
    assert name in page["read_attribute"](zoo.path)["parameters"]
    assert_reads_the_same(page, zoo.path, name)


def test_it_reads_a_run_that_is_being_recorded(page: dict[str, Any], tmp_path: Path) -> None:
    loop, store = Loop(), tmp_path / "run.zarr"
    with Recorder(store, loop.optimizer, parameter=loop.weight, memory_bytes=8000) as recorder:
        for _ in range(6):
            loop.step()
        recorder.flush()
        loop.step()
        assert_reads_the_same(page, store)
        assert page["read_commit"](store)["complete"] is False
        assert len(page["read_array"](store, "W")) == 7


def test_it_gives_what_the_dataset_gives_with_nothing_else_at_hand(toy_path: Path) -> None:
    """In a process in which this package, Zarr, xarray and google_crc32c cannot be imported."""
    forbidden = ("thimble_zarr", "zarr", "xarray", "google_crc32c", "tensorstore", "torch")
    script = f"""
import sys
import zlib
sys.modules |= dict.fromkeys({forbidden!r})
{SOURCE}
import hashlib
import itertools
for name in ("W", "grad"):
    print(hashlib.sha256(read_array({str(toy_path)!r}, name).tobytes()).hexdigest())
print(json.dumps(read_commit({str(toy_path)!r})))
"""
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    *digests, commit = shown.stdout.splitlines()
    ds = thimble_zarr.open_dataset(toy_path)
    expected = [hashlib.sha256(ds[name].values.tobytes()).hexdigest() for name in ("W", "grad")]
    assert digests == expected
    assert json.loads(commit)["n_rows"] == ds.sizes["step"]


def test_it_imports_only_what_the_page_says() -> None:
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(SOURCE))
        for name in names_imported(node)
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy", numcodecs.__name__}


def names_imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def flip_byte(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def read_some(page: dict[str, Any], store: Path) -> None:
    page["read_array"](store, "W")
    page["read_vector"](store / "step", 1)


@pytest.mark.parametrize("at", [0, 50, -1, -5])
@pytest.mark.parametrize("key", ["W/c.0.0.0", "step/c.0", ".thimble/commit.json"])
def test_it_sees_a_flipped_byte(page: dict[str, Any], toy_copy: Path, key: str, at: int) -> None:
    flip_byte(toy_copy / key, at)
    with pytest.raises(ValueError, match="does not match"):
        read_some(page, toy_copy)


def keys_of(value: object, *, but: tuple[str, ...]) -> Iterator[str]:
    """Yield all keys in JSON, but for what is below some of them, which others named."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in but:
                yield from keys_of(inner, but=but)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner, but=but)


OF_OTHERS = ("attrs", "dtypes")
OF_PATHS = ("files", "chunks", "values", "metadata")


def names_in(store: Path) -> Iterator[str]:
    """Yield every name in a store: of files, arrays, dims, attributes and fields of documents."""
    for file in store.rglob("*"):
        if not file.name.startswith("c."):
            yield file.name
    for file in store.rglob("zarr.json"):
        document = json.loads(file.read_bytes())
        attributes = document["attributes"]
        if document["node_type"] == "array":
            yield from document["dimension_names"]
            yield from attributes
        yield from keys_of(attributes.get("thimble"), but=OF_OTHERS)
    for line in (store / ".thimble/blocks.jsonl").read_bytes().splitlines():
        entry = json.loads(line)
        yield from keys_of(entry, but=OF_PATHS)
        for recorded in entry["files"].values():
            yield from recorded
    yield from json.loads((store / ".thimble/commit.json").read_bytes())
    if (store / ".thimble/writer.json").exists():
        yield from json.loads((store / ".thimble/writer.json").read_bytes())


def recorded_in_part(path: Path) -> None:
    options = {"schedule": every(5), "tokens": [1, 4], "attrs": {"seed": 1}}
    record(path, recorder_options=options)


def resumed(path: Path) -> None:
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=8000) as recorder:
        for _ in range(6):
            loop.step()
        recorder.flush()
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, memory_bytes=8000, resume=True
    ) as recorder:
        loop.step()


def repaired(path: Path) -> None:
    write_run(path)
    flip_byte(path / "W/c.1.0.0", 3)
    flip_byte(path / "text_end/c.0", 3)
    repair(path)


MADE: dict[str, Callable[[Path], object]] = {
    "whole": record,
    "amsgrad": lambda path: record(path, amsgrad=True),
    "predicted": lambda path: record(path, recorder_options={"coding": "predicted"}),
    "in part": recorded_in_part,
    "resumed": resumed,
    "repaired": repaired,
}


def documented() -> set[str]:
    return {word for code in in_code(PAGE) for word in re.findall(r"[\w.]+", code)}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_the_page_names_all_that_is_in_a_store(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / "run.zarr")
    assert names_not_documented(tmp_path / "run.zarr") == set()


def test_it_names_all_that_is_in_a_store_of_several_parameters(zoo: Recorded) -> None:
    others = {f"dim_{axis}" for axis in (1, 2, 3)}  # the page has the first and dots
    assert names_not_documented(zoo.path) - set(SHAPES) - others == set()


def test_it_names_all_that_a_writer_leaves_meanwhile(tmp_path: Path) -> None:
    writer = create(tmp_path / "run.zarr")
    try:
        found = set(json.loads((tmp_path / "run.zarr/.thimble/writer.json").read_bytes()))
        assert found <= documented()
    finally:
        writer.release()


ILLUSTRATED = {"zarr.json", "blocks.jsonl", "commit.json", "lock", ".thimble"}
"""Names of files, which the picture at the top has."""


def names_not_documented(store: Path) -> set[str]:
    (picture,) = (b.content for b in blocks(PAGE.read_text("utf-8")) if b.not_run is not None)
    assert set(picture.replace("/", " ").split()) >= {name.strip("/") for name in ILLUSTRATED}
    # The page calls any variable that is coded X.
    names = {re.sub(r"^\w+(?=_(keyframe|residual)$)", "X", name) for name in names_in(store)}
    return names - documented() - ILLUSTRATED


def test_a_name_that_is_missing_is_seen(toy_copy: Path) -> None:
    (toy_copy / "W/no_such_name").touch()
    assert names_not_documented(toy_copy) == {"no_such_name"}


def test_the_ledger_says_what_the_page_says_of_it(page: dict[str, Any], zoo: Recorded) -> None:
    """Sizes and checksums of every file, and both checksums of every chunk."""
    files, chunks = {}, {}
    for line in page["read_ledger"](zoo.path):
        files |= line["files"]
        block = (
            line["rows"][0] // page["read_attribute"](zoo.path / "norm")["layout"]["block_steps"]
        )
        chunks |= {(array, block): known for array, known in line["chunks"].items()}
    for key, known in files.items():
        content = (zoo.path / key).read_bytes()
        assert known["bytes"] == len(content)
        assert known.get("crc32") in (None, zlib.crc32(content))
        assert ("crc32" in known) == (key.rpartition("/c.")[0] not in {name for name, _ in chunks})
    for (array, block), known in chunks.items():
        shape = page["read_attribute"](zoo.path / array.rpartition("/")[0])["shape"]
        content = (zoo.path / array / (f"c.{block}" + ".0" * len(shape))).read_bytes()
        index = np.frombuffer(content[-16 * len(known) - 4 : -4], "<u8").reshape(-1, 2)
        for (offset, n_bytes), (stored, values) in zip(index.tolist(), known, strict=True):
            encoded = page["checked"](content[offset : offset + n_bytes])
            assert page["crc32c"](encoded) == stored
            assert page["crc32c"](numcodecs.blosc.decompress(encoded)) == values
    assert len(chunks) > len(SHAPES)


def test_labels_are_what_the_page_says_of_them(page: dict[str, Any], toy_path: Path) -> None:
    ds, n = thimble_zarr.open_dataset(toy_path), 11
    packed = bytes.fromhex(page["read_attribute"](toy_path)["stored_last"])
    last = np.unpackbits(np.frombuffer(packed, np.uint8))
    order = np.argsort(last[:n], kind="stable")
    assert not last[n:].any()
    np.testing.assert_array_equal(page["read_vector"](toy_path / "token", n), order)
    np.testing.assert_array_equal(page["read_vector"](toy_path / "dead", n), ds.dead.values[order])
    ends = page["read_vector"](toy_path / "text_end", n)
    utf8 = page["read_vector"](toy_path / "text_bytes", int(ends[-1])).tobytes()
    texts = [utf8[start:end].decode() for start, end in itertools.pairwise([0, *ends.tolist()])]
    assert texts == [str(text) for text in ds.text.values[order]]
