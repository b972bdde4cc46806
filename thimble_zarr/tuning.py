"""Tuning constants, which tests replace: sizes of pieces, and what is too little to be worth it.

No answer depends on them; a test holds that by replacing them all::

    monkeypatch.setattr("thimble_zarr.tuning.TUNING", replace(TUNING, task_steps=3))

So read them as `tuning.TUNING.task_steps` where they are needed, never at import.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Constants of speed, in elements, bytes, chunks or steps as their names say."""

    piece_characters: int = 2**14
    """Least length of the pieces of a text that are encoded: 16 at once take some 20 MB."""

    checkpoint_share: float = 0.005
    """Share of a run's time that taking checkpoints may have."""

    sample_elements: int = 2**19
    """Elements that causes are tried on; those that failed first are among them."""


TUNING = Tuning()
