"""The notebook's file, read in place."""

import pickle
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
import xarray as xr

from tests.support.notebook_file import import_notebook, refused, save
from tests.support.runs import N_DIMS, N_STEPS, N_TOKENS, History, token_labels
from tests.support.tuned import tuned
from thimble_zarr import accounting, open_dataset
from thimble_zarr.analysis.dataset.open import dataset_of
from thimble_zarr.bits import decode
from thimble_zarr.errors import DamagedStoreError, NotAStoreError, StoreError
from thimble_zarr.sources.containers.array import RawArray
from thimble_zarr.sources.containers.array import whole as read_whole
from thimble_zarr.sources.open import open_file_alone
from thimble_zarr.store.reader import StoreReader

N_ROWS = N_STEPS + 1


def test_stored_bits_are_those_of_a_recording(
    tmp_path: Path, file: Path, toy_path: Path, toy_history: History
) -> None:
    recorded = StoreReader.open(toy_path)
    for reader in (open_file_alone(file), import_notebook(file, tmp_path / "run.zarr")):
        assert reader.n_rows == recorded.n_rows == N_ROWS
        for name in recorded.schema.dtypes:
            bits = reader.read(name, (0, N_ROWS))
            assert bits.dtype == np.uint16
            np.testing.assert_array_equal(bits, recorded.read(name, (0, N_ROWS)), err_msg=name)
            np.testing.assert_array_equal(decode(bits, "bfloat16"), toy_history[name])
        scalars = reader.read_scalars()
        assert list(scalars) == list(reader.schema.scalars)
        for name, values in recorded.read_scalars().items():
            assert scalars[name].dtype == np.float64
            if name == "loss":
                values = values.astype(np.float32)  # the notebook's
            np.testing.assert_array_equal(scalars[name], values, err_msg=name)


def test_rows_and_tokens_are_read_alone(file: Path) -> None:
    reader = open_file_alone(file)
    for name in reader.schema.dtypes:
        whole = reader.read(name, (0, N_ROWS))
        for rows in ((0, 1), (3, 3), (2, 9), (N_ROWS - 1, N_ROWS)):
            for tokens in (range(1), range(4, 4), range(3, 8), np.array([N_TOKENS - 1, 0, 2, 0])):
                part = reader.read(name, rows, tokens)
                np.testing.assert_array_equal(part, whole[slice(*rows)][:, np.asarray(tokens, int)])
                part[:] = 1  # the array is the caller's


def test_tokens_are_read_with_what_lies_between_them_or_apart(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, calls, real = open_file_alone(file), list[tuple[int, int]](), RawArray.read_rows
    whole = reader.read("W", (0, N_ROWS))

    def read_rows(
        array: RawArray, opened: BinaryIO, rows: range, columns: tuple[int, int], out: np.ndarray
    ) -> None:
        calls.append(columns)
        real(array, opened, rows, columns, out)

    monkeypatch.setattr(RawArray, "read_rows", read_rows)
    tuned(monkeypatch, near_bytes=2 * N_DIMS * reader.run.series["W"].array.dtype.itemsize)
    for tokens, expected in (
        ([0, 2, 3, N_TOKENS - 2, N_TOKENS - 1], {(0, 4), (N_TOKENS - 2, N_TOKENS)}),
        ([N_TOKENS - 1, 0], {(0, N_TOKENS)}),  # not ascending
        ([1, 4], {(1, 2), (4, 5)}),
        ([1, 3], {(1, 4)}),
    ):
        calls.clear()
        np.testing.assert_array_equal(
            reader.read("W", (2, 9), np.array(tokens)), whole[2:9, tokens]
        )
        assert {*calls} == expected


def test_the_disk_is_told_of_what_will_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, content, told = open_file_alone(file), file.read_bytes(), list[tuple[int, int]]()
    monkeypatch.setattr(
        "thimble_zarr.sources.containers.array.tell_of_read",
        lambda descriptor, ranges: told.extend(ranges),
    )
    for tokens, (first, end) in (([1, 3], (1, 4)), (range(N_TOKENS), (0, N_TOKENS))):
        for name in reader.schema.dtypes:
            array = reader.run.series[name].array
            with reader.opened() as opened:
                opened.will_read([name], (2, 2), tokens)
                assert told == []
                opened.will_read([name], (2, 5), tokens)
            bits = b"".join(content[offset : offset + n_bytes] for offset, n_bytes in told)
            assert bits == read_whole(array)[2:5, first:end].tobytes()
            told.clear()


def test_what_is_read_together_lies_in_the_memory_that_is_given(file: Path) -> None:
    reader = open_file_alone(file)
    # As who computes has it: token by token.
    outs = {
        name: np.empty((N_TOKENS, 3, N_DIMS), np.uint16).transpose(1, 0, 2)
        for name in reader.schema.dtypes
    }
    with reader.opened() as opened:
        found = opened.read_together(outs, (2, 5), range(N_TOKENS))
    for name, out in outs.items():
        assert np.shares_memory(found[name], out)
        np.testing.assert_array_equal(found[name], reader.read(name, (2, 5)))


def test_a_reader_is_small_to_pickle(file: Path) -> None:
    reader = open_file_alone(file).labelled(token_labels())
    pickled = pickle.dumps(reader)
    assert len(pickled) < 10_000
    copy = pickle.loads(pickled)
    assert copy == reader
    np.testing.assert_array_equal(copy.read("W", (0, 3)), reader.read("W", (0, 3)))


def test_a_number_that_bfloat16_lacks_is_never_rounded_in_place(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    tensors["momentum_W"][3, 2, 1] = 1 + 2.0**-23  # not in a row that is looked at first
    reader = open_file_alone(save(tmp_path / "run.safetensors", tensors))
    assert reader.schema.dtypes["exp_avg"] == "bfloat16"
    reader.read("exp_avg", (0, 3))
    reader.read("exp_avg", (0, N_ROWS), (3, N_TOKENS))
    with pytest.raises(DamagedStoreError, match=r"momentum_W .* at step 3,.*thimble-zarr import"):
        reader.read("exp_avg", (0, N_ROWS), (2, 3))


def test_a_file_that_was_replaced_is_not_taken_for_the_one_that_was_opened(
    tmp_path: Path, file: Path, tensors: dict[str, torch.Tensor]
) -> None:
    reader = open_file_alone(file)
    tensors["W"] += 1
    other = save(tmp_path / "other.safetensors", tensors)
    assert other.stat().st_size == file.stat().st_size
    with pytest.raises(DamagedStoreError, match=r"was changed .* open it again"), reader.opened():
        other.replace(file)
    with pytest.raises(DamagedStoreError, match=r"was changed .* open it again"):
        reader.read("W", (0, 1))
    assert open_file_alone(file).read("W", (0, 1)).any()


def test_a_file_that_shrinks_while_it_is_read_is_told(file: Path) -> None:
    reader = open_file_alone(file)

    def read() -> None:
        with reader.opened() as opened:
            file.write_bytes(file.read_bytes()[:-N_DIMS])
            for name in reader.schema.dtypes:
                opened.read(name, (0, N_ROWS))

    with pytest.raises(DamagedStoreError, match=f"{file}: it was cut off after it was opened"):
        read()
    file.unlink()
    with pytest.raises(StoreError, match="No such file"):
        reader.read("W", (0, 1))


def test_the_analysis_is_the_same_in_place(tmp_path: Path, file: Path, toy_path: Path) -> None:
    labels = token_labels()
    in_place = dataset_of(open_file_alone(file).labelled(labels))
    import_notebook(file, tmp_path / "run.zarr", labels=labels)
    imported, recorded = open_dataset(tmp_path / "run.zarr"), open_dataset(toy_path)
    for ds in (in_place, imported):
        table = accounting(ds.sel(token=ds.dead))
        xr.testing.assert_equal(table, accounting(recorded.sel(token=recorded.dead)))
        xr.testing.assert_equal(ds.adam_residual.compute(), recorded.adam_residual.compute())
        assert np.isnan(ds.grad[0].values).all()
    assert in_place.identical(imported.assign_attrs(in_place.attrs))


def test_there_must_be_a_file(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.safetensors", NotAStoreError, "there is nothing at")
    (tmp_path / "directory").mkdir()
    refused(tmp_path / "directory", StoreError, "Is a directory")
