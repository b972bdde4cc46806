"""Rows read while shards stay open."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support import stores
from thimble_zarr import tuning
from thimble_zarr.errors import DamagedStoreError
from thimble_zarr.store.coding.shard_codec import ShardFile
from thimble_zarr.store.reader import StoreReader

EVERY = range(11)


@pytest.fixture
def reader(tmp_path: Path) -> StoreReader:
    stores.write_run(tmp_path / "run.zarr")
    return StoreReader.open(tmp_path / "run.zarr")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The shards that were opened, of which none is left open."""
    files: list[str] = []
    n_open = 0
    enter, leave = ShardFile.__enter__, ShardFile.__exit__

    def count(shard: ShardFile) -> ShardFile:
        nonlocal n_open
        entered = enter(shard)
        files.append("/".join(shard.key.split("/")[-2:]))
        n_open += 1
        return entered

    def count_down(shard: ShardFile, *error: object) -> None:
        nonlocal n_open
        n_open -= 1
        leave(shard, *error)

    monkeypatch.setattr(ShardFile, "__enter__", count)
    monkeypatch.setattr(ShardFile, "__exit__", count_down)
    yield files
    assert n_open == 0


def test_a_shard_is_opened_once_for_all_who_read_of_it(
    reader: StoreReader, opened: list[str]
) -> None:
    whole = reader.read("grad", (0, 10))
    opened.clear()
    with reader.opened() as rows:
        for tokens in (range(3), np.array([7, 2]), range(3), EVERY):
            for span in ((0, 4), (2, 8), (7, 8)):
                expected = whole[slice(*span)][:, np.asarray(tokens)]
                np.testing.assert_array_equal(rows.read("grad", span, tokens), expected)
    assert opened == ["grad/c.0.0.0", "grad/c.1.0.0"]


def test_no_more_shards_stay_open_than_are_needed(reader: StoreReader, opened: list[str]) -> None:
    n_open = 0
    with reader.opened() as rows:
        for row in (0, 4, 0, 8, 0, 4):
            rows.read("W", (row, row + 1), EVERY)
            rows.read("grad", (row, row + 1), EVERY)
            n_open = max(n_open, sum(map(len, rows._shards.values())))
    assert n_open == 2 * 2  # of the last two blocks
    assert [int(file.split(".")[1]) for file in opened[::2]] == [0, 1, 2, 1]


def test_it_is_remembered_of_a_few_tokens_where_they_lie(
    reader: StoreReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dataclasses.replace(tuning.TUNING, remembered_selections=3)
    monkeypatch.setattr(tuning, "TUNING", few)
    whole = reader.read("W", (0, 1))
    with reader.opened() as rows:
        for first in [*EVERY, *EVERY]:
            tokens = np.array([first, 10 - first])  # freed at once, so that others have its place
            np.testing.assert_array_equal(rows.read("W", (0, 1), tokens), whole[:, tokens])
            assert len(rows._known) <= 3


def test_memory_is_used_that_is_given(reader: StoreReader) -> None:
    memory = np.empty((10, 11, 5), np.uint16)
    with reader.opened() as rows:
        assert rows.read("W", (0, 10), EVERY, memory) is memory
    np.testing.assert_array_equal(memory, reader.read("W", (0, 10)))


@pytest.mark.parametrize("tokens", [EVERY, range(2, 9), np.array([7, 2, 3, 10])])
def test_memory_may_have_the_steps_of_a_token_side_by_side(
    reader: StoreReader, tokens: range | np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are decoded where they are needed, if they are needed whole."""
    into = []
    real = ShardFile.can_decode_into
    monkeypatch.setattr(
        ShardFile, "can_decode_into", lambda *args: into.append(real(*args)) or into[-1]
    )
    for rows in ((0, 4), (0, 10), (3, 9)):
        memory = np.zeros((len(tokens), rows[1] - rows[0], 5), np.uint16).transpose(1, 0, 2)
        with reader.opened() as opened_rows:
            assert opened_rows.read("W", rows, tokens, memory) is memory
        expected = reader.read("W", rows)[:, np.asarray(tokens)]
        np.testing.assert_array_equal(memory, expected)
    assert any(into) == isinstance(tokens, range)


def test_what_cannot_be_opened_or_decoded_is_damage_and_the_rest_can_be_read(
    reader: StoreReader, opened: list[str]
) -> None:
    first, second = (reader.path / f"W/c.{block}.0.0" for block in (0, 1))
    content = bytearray(first.read_bytes())
    content[len(content) // 3] ^= 1
    first.write_bytes(content)
    os.truncate(second, 5)
    with reader.opened() as rows:
        for row in (0, 4, 0):
            with pytest.raises(DamagedStoreError, match=f"W from step {row} on"):
                rows.read("W", (row, row + 1), EVERY)
        assert rows.read("W", (8, 9), EVERY).shape == (1, 11, 5)
    assert opened == ["W/c.0.0.0", "W/c.2.0.0"]


def test_what_was_opened_is_what_is_read_whatever_becomes_of_the_file(reader: StoreReader) -> None:
    whole = reader.read("W", (0, 4))
    with reader.opened() as rows:
        rows.read("W", (0, 1), EVERY)
        (reader.path / "W/c.0.0.0").unlink()
        np.testing.assert_array_equal(rows.read("W", (0, 4), EVERY), whole)
