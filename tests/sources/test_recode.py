"""A store that is written again with another coding has the same bits."""

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.faults import flip_in_place, relabel
from tests.support.runs import record
from tests.support.zoo import Recorded
from thimble_zarr import every
from thimble_zarr.errors import ConfigError, DamagedStoreError, StoreExistsError, ThimbleError
from thimble_zarr.format.coding import PLAIN
from thimble_zarr.format.layout import Layout
from thimble_zarr.sources import recode as recode_module
from thimble_zarr.sources.recode import recode
from thimble_zarr.store.coding.compression import COMPRESSIONS
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.reader import StoreReader

MEMORY = 10_000

BLOCKS_OF_FOUR = {"plain": 8_000, "predicted": 10_000}
"""Memory for a copy of the toy run of that coding."""


def everything_in(path: Path) -> list[object]:
    """Return all that a store says of a run, however it is written."""
    found: list[object] = []
    for reader in StoreReader.open_each(path):
        labels, rows = reader.read_labels(), (0, reader.n_rows)
        found += [reader.group, reader.commit.complete, reader.read_steps().tolist()]
        # Neither how it is written nor how long its blocks are.
        found += [replace(reader.schema, coding=PLAIN, layout=Layout(1, 1))]
        found += [reader.read_token_ids().tolist(), labels.text]
        found += [
            None if label is None else label.tolist()
            for label in (labels.count, labels.live, labels.dead)
        ]
        found += [reader.read(name, rows).tobytes() for name in reader.schema.dtypes]
        found += [values.tobytes() for values in reader.read_scalars().values()]
    return found


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, zoo: Recorded, toy_run: tuple[Path, object]
) -> dict[str, Path]:
    """Stores of every kind."""
    directory = tmp_path_factory.mktemp("sources")
    some = {"tokens": [10, 2, 7], "labels": None}
    record(directory / "some", recorder_options=some)
    record(directory / "schedule", recorder_options={"schedule": every(3)})
    record(directory / "weights", recorder_options={"variables": ("W",)})
    fused = {"fused": True, "amsgrad": True, "dtype": torch.float32}
    record(directory / "float32", recorder_options={"coding": "predicted"}, **fused)
    names = ("some", "schedule", "weights", "float32")
    return {"several": zoo.path, "toy": toy_run[0]} | {name: directory / name for name in names}


@pytest.mark.parametrize("source", ["several", "toy", "some", "schedule", "weights", "float32"])
def test_there_and_back(sources: dict[str, Path], tmp_path: Path, source: str) -> None:
    paths = [sources[source], tmp_path / "predicted", tmp_path / "archive", tmp_path / "plain"]
    memory = 200_000 if source == "several" else MEMORY
    recode(paths[0], paths[1], memory_bytes=memory)
    recode(paths[1], paths[2], memory_bytes=2 * memory, archive=True)
    recode(paths[2], paths[3], memory_bytes=memory, coding="plain")
    before = everything_in(paths[0])
    for path in paths[1:]:
        assert everything_in(path) == before
        assert verify(path).findings == []
    codecs = [StoreReader.open_each(path)[0].schema.coding.gradient_codec for path in paths[1:]]
    assert codecs == ["lz4-bitshuffle", "pcodec", "lz4"]
    assert set(codecs) == set(COMPRESSIONS)
    steps = {StoreReader.open_each(path)[0].schema.layout.block_steps for path in paths}
    assert len(steps) > 1  # blocks begin elsewhere


def interrupted(source: Path, path: Path, n_blocks: int, **options: object) -> Path:
    calls = itertools.count(1)

    def progress(n_done: int, n_total: int) -> None:
        assert 0 < n_done <= n_total
        if next(calls) == n_blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recode(source, path, on_progress=progress, **options)
    return path


@pytest.mark.parametrize("n_blocks", [1, 3, 5])
@pytest.mark.parametrize("coding", ["plain", "predicted"])
def test_a_copy_that_was_interrupted_is_gone_on_with(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coding: str, n_blocks: int
) -> None:
    options = {"coding": coding, "memory_bytes": BLOCKS_OF_FOUR[coding]}
    path = interrupted(toy_path, tmp_path / "copy", n_blocks, **options)
    assert 0 < StoreReader.open(path).n_rows <= StoreReader.open(toy_path).n_rows
    copied: list[tuple[int, int]] = []
    real = recode_module._copy_block
    monkeypatch.setattr(
        recode_module, "_copy_block", lambda *args: (copied.append(args[3]), real(*args))
    )
    recode(toy_path, path, **options)
    assert len(copied) == {1: 3, 3: 1, 5: 1}[n_blocks]  # the last one is not full
    assert everything_in(path) == everything_in(toy_path)
    assert verify(path).findings == []


def unchanged(path: Path) -> dict[str, bytes]:
    """Return every file but that of the lock."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name not in ("lock", "writer.json")
    }


def other_run(toy_path: Path, path: Path) -> None:
    """Something else happened."""
    record(path, recorder_options={"memory_bytes": MEMORY}, lr=2e-2)


def same_run_of_another_day(toy_path: Path, path: Path) -> None:
    relabel(toy_path, path.with_name("later"), created="2020-01-01T00:00:00+00:00")
    recode(path.with_name("later"), path, memory_bytes=MEMORY, coding="plain")


def more_of_it(toy_path: Path, path: Path) -> None:
    record(path, n_steps=20, recorder_options={"memory_bytes": MEMORY})


@pytest.mark.parametrize("lies_there", [other_run, same_run_of_another_day, more_of_it])
def test_another_recording_is_not_written_over(
    toy_path: Path, tmp_path: Path, lies_there: Callable[[Path, Path], None]
) -> None:
    path = tmp_path / "copy"
    lies_there(toy_path, path)
    before = unchanged(path)
    with pytest.raises(ThimbleError, match=r"another (recording|run)"):
        recode(toy_path, path, memory_bytes=MEMORY, coding="plain")
    assert unchanged(path) == before
    recode(toy_path, path, memory_bytes=MEMORY, coding="plain", overwrite=True)
    assert everything_in(path) == everything_in(toy_path)


def test_a_copy_is_no_archive_because_one_is_asked_for_later(
    toy_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    recode(toy_path, path)
    before = unchanged(path)
    with pytest.raises(StoreExistsError, match="by the codec lz4-bitshuffle, not pcodec"):
        recode(toy_path, path, archive=True)
    assert unchanged(path) == before
    (archive,) = recode(toy_path, path, archive=True, overwrite=True)
    assert archive.schema.coding.gradient_codec == "pcodec"


def test_no_memory_makes_the_shortest_blocks(toy_path: Path, tmp_path: Path) -> None:
    (copy,) = recode(toy_path, tmp_path / "copy", memory_bytes=0)
    assert copy.schema.layout.block_steps == 1
    assert everything_in(copy.path) == everything_in(toy_path)


def test_a_copy_of_a_schedule_is_begun_again(sources: dict[str, Path], tmp_path: Path) -> None:
    path = interrupted(sources["schedule"], tmp_path / "copy", 1, memory_bytes=MEMORY)
    with pytest.raises(StoreExistsError, match=r"a recording with a schedule cannot be gone on"):
        recode(sources["schedule"], path, memory_bytes=MEMORY)
    recode(sources["schedule"], path, memory_bytes=MEMORY, overwrite=True)
    assert everything_in(path) == everything_in(sources["schedule"])


def test_what_was_changed_meanwhile_is_told(
    toy_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = recode_module._compare_block

    def compare(readers: Sequence[StoreReader], others: object, rows: tuple[int, int]) -> None:
        if rows[0] == 0:
            flip_in_place(toy_copy, "W", (5, 3, 2), 1)
        real(readers, others, rows)

    monkeypatch.setattr(recode_module, "_compare_block", compare)
    with pytest.raises(DamagedStoreError, match=r"copy: W of rows 4 to 7 is not as in"):
        recode(toy_copy, tmp_path / "copy", memory_bytes=MEMORY)


def test_a_damaged_store_is_not_copied(toy_copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(toy_copy / "W")
    with pytest.raises(DamagedStoreError, match="cannot open array W"):
        recode(toy_copy, tmp_path / "copy")


@pytest.mark.parametrize("path", ["run.zarr", "sub/../run.zarr", "link/run.zarr", "run.zarr/copy"])
def test_a_store_is_not_its_own_copy(toy_copy: Path, tmp_path: Path, path: str) -> None:
    source = toy_copy.rename(tmp_path / "run.zarr")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    before = everything_in(source)
    with pytest.raises(ConfigError, match="cannot be written over itself"):
        recode(source, tmp_path / path, overwrite=True)
    assert everything_in(source) == before
    assert [*source.glob("copy")] == []


def test_what_contradicts_itself_is_refused(toy_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="archive is for the coding predicted"):
        recode(toy_path, tmp_path / "copy", coding="plain", archive=True)
