"""Where a run computes and in which dtype: the machine decides what the settings leave open."""

import platform
from contextlib import suppress
from dataclasses import dataclass

import torch

from thimble_zarr.errors import ConfigError
from thimble_zarr.experiment.config import AUTO, TrainingConfig


@dataclass(frozen=True)
class ComputeDtype:
    """The dtype of forward and backward, and why: half a sentence, empty where it is plain."""

    name: str
    reason: str


def find_device(wanted: str | None) -> torch.device:
    """Return the wanted device, which must be available, or the best one: cuda, mps, cpu."""
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [*(name for name, there in is_there.items() if there), "cpu"]
    if wanted is None:
        return torch.device(available[0])
    with suppress(RuntimeError):  # not a device's name
        device = torch.device(wanted)
        n_devices = torch.cuda.device_count() if device.type == "cuda" else 1
        if device.type in available and (device.index or 0) < n_devices:
            return device
    raise ConfigError(
        f"device {wanted!r} is not available here; choose from {', '.join(available)}"
    )


def choose_compute_dtype(config: TrainingConfig) -> ComputeDtype:
    """Return the dtype that `compute_dtype` stands for on this machine.

    `auto` is the parameters' dtype, except for bfloat16 on a CPU that cannot multiply bfloat16
    matrices: torch emulates that 20 to 50 times slower than float32.
    """
    if config.compute_dtype != AUTO:
        return ComputeDtype(config.compute_dtype, "")
    on_cpu = config.dtype == "bfloat16" and find_device(config.device).type == "cpu"
    if on_cpu and not cpu_multiplies_bfloat16():
        return ComputeDtype("float32", "this CPU has no fast bfloat16")
    return ComputeDtype(config.dtype, "")


def cpu_multiplies_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16 matrices and torch uses them."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # On x86 that flag is also set for AVX-512 alone. Every CPU with AMX has AVX512-BF16, too.
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported()
