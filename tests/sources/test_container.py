"""Files that are no safetensors file, or no whole one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.notebook_file import refused, save
from tests.support.runs import N_DIMS, N_STEPS, N_TOKENS
from thimble_zarr.errors import DamagedStoreError, NotAStoreError

N_ROWS = N_STEPS + 1


def test_a_file_cut_off_anywhere_is_never_read(tmp_path: Path, file: Path) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    cut = tmp_path / "cut.safetensors"
    for n_bytes in (0, 1, 7, 8):
        cut.write_bytes(content[:n_bytes])
        refused(cut, NotAStoreError, "not a safetensors file")
    for n_bytes in (9, 8 + length // 2, 7 + length, 8 + length, len(content) // 2):
        cut.write_bytes(content[:n_bytes])
        refused(cut, DamagedStoreError, f"it has {n_bytes:,} bytes, and its header promises")
    for longer_or_shorter in (content[:-1], content + b"x"):
        cut.write_bytes(longer_or_shorter)
        refused(cut, DamagedStoreError, f"{len(longer_or_shorter):,} .* {len(content):,}")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no safetensors",
        b"PK\x03\x04 a torch checkpoint is a zip file",
        bytes(100),
        (1).to_bytes(8, "little") + b"{",
        (2).to_bytes(8, "little") + b"[]",
        (10**8 + 1).to_bytes(8, "little") + b"{}",
        b"\xff" * 8 + b"{}",
    ],
    ids=range(8),
)
def test_another_file_is_not_taken_for_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file", NotAStoreError, "it is not a safetensors file")


def edited(file: Path, edit: Callable[[dict], object]) -> Path:
    """Change the JSON header."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(edit(header) or header).encode()
    target = file.with_name("edited.safetensors")
    target.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return target


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h["W"].update(shape=[N_ROWS, N_TOKENS, N_DIMS + 1]),
        lambda h: h["W"].update(shape=[-1, N_TOKENS, N_DIMS]),
        lambda h: h["W"].update(shape=[1.5]),
        lambda h: h["W"].update(shape=[10**30, 10**30, 10**30]),
        lambda h: h["W"].update(shape=[2**32, 2**32, 2**32]),
        lambda h: h["W"].update(shape=None),
        lambda h: h["W"].update(dtype="F7"),
        lambda h: h["W"].update(dtype=["F32"]),
        lambda h: h["W"].update(dtype="F32"),
        lambda h: h["W"].update(data_offsets=[0, 1540]),
        lambda h: h["W"].update(data_offsets=[5]),
        lambda h: h["W"].update(data_offsets=["a", "b"]),
        lambda h: h["W"].pop("dtype") and None,
        lambda h: h.update(W=3),
        lambda h: {"__metadata__": {"a": 1}, **h},
        lambda h: {"__metadata__": 1, **h},
    ],
    ids=range(16),
)
def test_a_header_that_is_not_sound_is_refused(file: Path, edit: Callable[[dict], object]) -> None:
    refused(edited(file, edit), NotAStoreError, "it is not a sound safetensors file")


def test_a_dtype_that_is_not_known_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    file = save(tmp_path / "x.safetensors", tensors | {"z": torch.zeros(3, dtype=torch.complex64)})
    refused(file, NotAStoreError, "its tensor 'z' has the unknown dtype 'C64'")


def test_a_header_nested_without_end_is_refused(tmp_path: Path) -> None:
    text = b'{"a":' + b"[" * 100_000
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text)
    refused(tmp_path / "file", NotAStoreError, "not a sound safetensors file")
