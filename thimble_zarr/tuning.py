"""Tuning constants, which tests replace: sizes of pieces, and what is too little to be worth it.

No answer depends on them; a test holds that by replacing them all::

    monkeypatch.setattr("thimble_zarr.tuning.TUNING", replace(TUNING, task_steps=3))

So read them as `tuning.TUNING.task_steps` where they are needed, never at import.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Constants of speed, in elements, bytes, chunks or steps as their names say."""


TUNING = Tuning()
