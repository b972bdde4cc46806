"""A recording is opened wherever it lies, and its parameters by name or pattern."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.notebook_file import live_mask, save
from tests.support.runs import N_TOKENS
from thimble_zarr import Recorder
from thimble_zarr.errors import ConfigError, CorpusError, NotAStoreError, SelectionError
from thimble_zarr.sources.open import open_recording
from thimble_zarr.sources.reader import FileReader
from thimble_zarr.store.reader import StoreReader


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A run of three parameters."""
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 2, bias=False)}
    )
    optimizer = torch.optim.AdamW(model.parameters())
    parameters = dict(model.named_parameters())
    with Recorder(tmp_path / "run.zarr", optimizer, parameters=parameters):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return tmp_path / "run.zarr"


def names(path: Path, *patterns: str) -> list[str | None]:
    return [reader.schema.parameter for reader in open_recording(path, parameters=patterns)]


def test_parameters_are_opened_in_the_order_of_the_recording(several: Path) -> None:
    everything = ["a.weight", "a.bias", "b.weight"]
    assert names(several) == names(several, "*") == everything
    assert names(several, "b.weight", "a.weight") == ["a.weight", "b.weight"]
    assert names(several, "*.bias", "a.*") == ["a.weight", "a.bias"]
    with pytest.raises(SelectionError, match=r"no parameter c\.\*; there is a\.weight, a\.bias, b"):
        names(several, "a.*", "c.*")


def test_a_file_of_the_notebook_is_opened_in_place(file: Path, toy_path: Path) -> None:
    (in_place,), (stored,) = open_recording(file), open_recording(toy_path)
    assert isinstance(in_place, FileReader)
    assert isinstance(stored, StoreReader)
    np.testing.assert_array_equal(in_place.read("W", (0, 3)), stored.read("W", (0, 3)))
    assert in_place.read_labels().live is None


def test_a_mask_labels_the_tokens_of_a_file_only(
    tmp_path: Path, file: Path, toy_path: Path
) -> None:
    mask = save(tmp_path / "mask", {"dead_mask": ~live_mask()})
    (reader,) = open_recording(file, token_mask=mask)
    assert reader.read_labels().live.tolist() == live_mask().tolist()
    with pytest.raises(ConfigError, match=r"is no safetensors file .* a token mask is for those"):
        open_recording(toy_path, token_mask=mask)
    other = save(tmp_path / "other", {"dead_mask": torch.zeros(N_TOKENS + 1).bool()})
    with pytest.raises(CorpusError, match="use the mask of this tokenizer"):
        open_recording(file, token_mask=other)


def test_what_is_neither_is_said_to_be_neither(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no recording")
    with pytest.raises(NotAStoreError, match=r"notes is not a thimble-zarr store; .* safetensors"):
        open_recording(tmp_path / "notes")
    with pytest.raises(NotAStoreError):
        open_recording(tmp_path / "nothing")
