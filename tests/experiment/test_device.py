from dataclasses import replace

import pytest
import torch

from thimble_zarr.errors import ConfigError
from thimble_zarr.experiment import device
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.device import choose_compute_dtype, find_device

BFLOAT16 = TrainingConfig(device="cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_best_device_is_found(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device(None).type == expected
    assert find_device(expected).type == expected
    assert find_device("cpu").type == "cpu"


def test_a_numbered_device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", "mps", "tpu", "", "cpu:x", "cpu:", "cpu:-2"])
def test_a_device_that_is_not_there_is_refused_and_those_there_are_named(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"'{wanted}'.*cpu"):
        find_device(wanted)


def on_a_cpu(monkeypatch: pytest.MonkeyPatch, *, machine: str, onednn: bool, avx512: bool) -> None:
    """Pretend that torch sees another CPU."""
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512", "expected"),
    [
        ("x86_64", False, False, "float32"),  # AVX2 only
        ("x86_64", False, True, "float32"),  # torch is told not to use what the CPU has
        ("x86_64", True, False, "float32"),  # AVX-512 without its bfloat16 instructions
        ("x86_64", True, True, "bfloat16"),
        ("AMD64", True, False, "float32"),
        ("aarch64", True, False, "bfloat16"),
        ("aarch64", False, False, "float32"),
    ],
)
def test_auto_is_float32_where_the_cpu_would_emulate_bfloat16(
    monkeypatch: pytest.MonkeyPatch, machine: str, onednn: bool, avx512: bool, expected: str
) -> None:
    on_a_cpu(monkeypatch, machine=machine, onednn=onednn, avx512=avx512)
    found = choose_compute_dtype(BFLOAT16)
    assert found.name == expected
    assert bool(found.reason) == (expected == "float32")


def test_a_torch_without_onednn_is_one_that_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu(monkeypatch, machine="arm64", onednn=True, avx512=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_compute_dtype(BFLOAT16).name == "float32"


def test_auto_asks_nothing_of_a_float32_model_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu(monkeypatch, machine="x86_64", onednn=False, avx512=False)
    assert choose_compute_dtype(replace(BFLOAT16, dtype="float32")).name == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for wanted in (None, "cuda", "cuda:0"):
        assert choose_compute_dtype(replace(BFLOAT16, device=wanted)).name == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_what_is_chosen_is_taken(monkeypatch: pytest.MonkeyPatch, dtype: str, chosen: str) -> None:
    on_a_cpu(monkeypatch, machine="x86_64", onednn=False, avx512=False)
    config = replace(BFLOAT16, dtype=dtype, compute_dtype=chosen)
    assert choose_compute_dtype(config).name == config.compute_dtype


def test_the_flags_are_ones_that_torch_has() -> None:
    assert isinstance(device.cpu_multiplies_bfloat16(), bool)
