"""Other tuning constants for a test."""

from dataclasses import replace

import pytest

from thimble_zarr import tuning


def tuned(monkeypatch: pytest.MonkeyPatch, **constants: float) -> None:
    """Replace some, until the test ends."""
    monkeypatch.setattr("thimble_zarr.tuning.TUNING", replace(tuning.TUNING, **constants))
