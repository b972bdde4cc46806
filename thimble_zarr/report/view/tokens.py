"""Tokens as a table: found by text or id, or because they changed regime in a span of steps."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from thimble_zarr.report.downsample import blocks
from thimble_zarr.report.panels.regimes import Exits
from thimble_zarr.report.run import Run

REGIMES = ("early", "midlife", "late", "frozen", "not finite")
"""What a token goes through, in this order; it may leave out any. Weights that are no numbers any
more are not called frozen, although no move of theirs is known."""

FROZEN = REGIMES.index("frozen")


@dataclass(frozen=True)
class Change:
    """Tokens that changed regime: where they are, when, and from which regime to which.

    Attributes
    ----------
    positions
        Which tokens, int64, shape `(change,)`; one that changed twice is there twice.
    steps
        The last step in the regime before, same shape.
    before, after
        Indices into `REGIMES`, same shape.
    """

    positions: np.ndarray
    steps: np.ndarray
    before: np.ndarray
    after: np.ndarray

    @property
    def words(self) -> list[str]:
        """Each change in words."""
        return [
            f"{REGIMES[before]} → {REGIMES[after]}"
            for before, after in zip(self.before.tolist(), self.after.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Tokens:
    """The tokens, or rows, of a run: what is known of each.

    Positions are indices along the first dimension of the parameter.
    """

    run: Run

    @cached_property
    def ids(self) -> np.ndarray:
        """Their ids, int64, shape `(token,)`."""
        return self.run.ids

    @cached_property
    def texts(self) -> list[str]:
        """The text of each; empty where it is not known."""
        texts = self._known("text")
        return [""] * len(self.ids) if texts is None else [str(text) for text in texts.tolist()]

    @cached_property
    def counts(self) -> np.ndarray | None:
        """How often each occurs in the corpus; None where nobody counted."""
        return self._known("n_occurrences")

    @cached_property
    def is_dead(self) -> np.ndarray | None:
        """Which of them never occur; None where that is not known."""
        return self._known("dead")

    def _known(self, name: str) -> np.ndarray | None:
        coords = self.run.ds.coords
        return coords[name].values if name in coords else None

    @cached_property
    def freeze_steps(self) -> np.ndarray:
        """The last step at which each moved, int64; the last step of the run if it still does."""
        return self._exits.late

    @cached_property
    def last_step(self) -> int:
        """The last step of which it is known what it changed; 0 if there is none."""
        return self._exits.last

    @cached_property
    def _exits(self) -> Exits:
        """When they left each regime."""
        return Exits.of(self.run)

    def found(self, query: str, *, n_most: int = 200) -> np.ndarray:
        """Return positions of tokens that a query names: by id, by their text or a part of it.

        The id comes first, then the exact text, then the same text but for spaces around it and
        capitals, then texts that contain it; the frequent ones before the rare.
        """
        wanted = query.strip().casefold()
        ranks = np.full(len(self.ids), 4)
        if wanted:
            for position, text in enumerate(self.texts):
                plain = text.casefold()
                if wanted in plain:
                    ranks[position] = 1 if text == query else 2 if plain.strip() == wanted else 3
        if wanted.isascii() and wanted.isdecimal():
            ranks[self.ids == int(wanted)] = 0
        elif query and not wanted:  # spaces alone
            ranks[[query == text for text in self.texts]] = 1
        rarity = np.zeros(len(ranks)) if self.counts is None else -self.counts
        order = np.lexsort((rarity, ranks))
        return order[: min(n_most, int((ranks < 4).sum()))]

    @cached_property
    def _boundaries(self) -> np.ndarray:
        """The last step that is in each regime or one before, shape `(3, token)`."""
        lasts = np.stack([self._exits.early, self._exits.midlife, self._exits.late])
        bounds: np.ndarray = np.maximum.accumulate(lasts, axis=0)
        return bounds

    def changed(self, first: int, last: int) -> Change:
        """Return the changes of regime after the steps `first` to `last`, by step.

        A token that is in its regime at the last step of the run has not left it.
        """
        bounds = self._boundaries
        until = np.vstack([bounds, np.full_like(bounds[:1], self.last_step)])
        since = np.vstack([np.zeros_like(bounds[:1]), bounds])
        was_in = until > since  # at some step
        found: list[tuple[int, int, int, int]] = []
        for before in range(len(bounds)):
            leaves = was_in[before] & (bounds[before] >= first) & (bounds[before] <= last)
            for position in np.flatnonzero(leaves & (bounds[before] < self.last_step)).tolist():
                after = before + 1 + int(np.argmax(was_in[before + 1 :, position]))
                found.append((int(bounds[before, position]), position, before, after))
        steps, positions, left, entered = np.array(sorted(found), np.int64).reshape(-1, 4).T
        is_lost = (entered == FROZEN) & ~self._exits.is_finite[positions]
        return Change(positions, steps, left, np.where(is_lost, FROZEN + 1, entered))

    def sample(self, positions: np.ndarray, seed: int = 0) -> np.ndarray:
        """Return as many other tokens at random, or all others where there are fewer; ascending.

        Dead and live are drawn in the proportion that `positions` have them, as far as they reach.
        """
        random = np.random.default_rng(seed)
        others = np.setdiff1d(np.arange(len(self.ids)), positions)
        if self.is_dead is None:
            parts = [(others, len(positions))]
        else:
            parts = [
                (others[self.is_dead[others] == dead], int((self.is_dead[positions] == dead).sum()))
                for dead in (False, True)
            ]
        drawn = [random.permutation(pool)[:n_wanted] for pool, n_wanted in parts]
        return np.sort(np.concatenate(drawn))


def median_over_tokens(variable: xr.DataArray, positions: np.ndarray) -> np.ndarray:
    """Return the median over some tokens at each step, of a variable `(step, token)`.

    NaN where no token has a number. The variable is read some steps at a time.
    """
    n_steps, n_tokens = variable.shape
    medians = np.full(n_steps, np.nan)
    for rows in blocks(n_steps, n_tokens * variable.dtype.itemsize):
        values = variable.isel(step=rows).values[:, positions]
        known = ~np.isnan(values).all(axis=1) if values.shape[1] else np.zeros(len(values), bool)
        medians[rows][known] = np.nanmedian(values[known], axis=1)
    return medians
