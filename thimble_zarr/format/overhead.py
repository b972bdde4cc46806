"""What recording costs: measured where it is spent, kept in the ledger, added up when asked for."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, TypeVar

Item = TypeVar("Item")

ENOUGH_STEPS, ENOUGH_S = 50, 10.0
"""Steps, and seconds of training, from which on a share of it is no accident."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What recording some steps took. Two of them add up; `sum(blocks, Overhead())` is the run's.

    Attributes
    ----------
    n_steps, n_waits
        Steps of training, and those that waited for a free block: the writer did not keep up.
    n_queued
        Blocks that were handed over while an earlier one was still being written.
    elapsed_s
        Wall time of the steps: forward, backward, optimizer, recording and all else.
    copy_s, wait_s
        Of it, spent on copying rows, and on waiting for the writer thread.
    audit_s, encode_s, write_s, sync_s
        Wall time of the writer thread, beside training: taking steps again, compressing and
        computing checksums, handing bytes to the operating system, and waiting until they are on
        disk.
    n_bytes
        Bytes of the files that were written.
    """

    n_steps: int = 0
    n_waits: int = 0
    n_queued: int = 0
    elapsed_s: float = 0.0
    copy_s: float = 0.0
    wait_s: float = 0.0
    audit_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    sync_s: float = 0.0
    n_bytes: int = 0

    def __add__(self, other: "Overhead") -> "Overhead":
        ours, theirs = asdict(self), asdict(other)
        return Overhead(**{name: ours[name] + theirs[name] for name in ours})

    @property
    def training_share(self) -> float:
        """Share of training time that recording took. There must be a step."""
        return (self.copy_s + self.wait_s) / self.elapsed_s

    @property
    def writer_share(self) -> float:
        """Share of training time in which the writer thread was busy. There must be a step.

        Near 1, or above it where training ended first, the writer does not keep up.
        """
        return (self.audit_s + self.encode_s + self.write_s + self.sync_s) / self.elapsed_s

    @property
    def bytes_per_s(self) -> float:
        """Bytes written a second of training. There must be a step."""
        return self.n_bytes / self.elapsed_s

    @property
    def telling(self) -> bool:
        """Whether enough was measured to judge by."""
        return self.n_steps >= ENOUGH_STEPS and self.elapsed_s >= ENOUGH_S

    @property
    def advice(self) -> str:
        """What took most of training's time, and what would help. There must be a step."""
        if self.copy_s >= self.wait_s:
            row_ms, step_ms = (1e3 * s / self.n_steps for s in (self.copy_s, self.elapsed_s))
            return (
                f"copying a row takes {row_ms:.3g} ms of a step's {step_ms:.3g} ms: record fewer "
                "parameters, or let a step do more (larger batches, accumulation)"
            )
        remedies = {
            "auditing": (self.audit_s, "leave a core for it, or check the run when it has ended"),
            "compressing": (self.encode_s, "leave a core for it (torch.set_num_threads)"),
            "writing": (self.write_s, "choose a faster disk"),
            "syncing": (self.sync_s, "give more memory_bytes, for fewer blocks, or a faster disk"),
        }
        slowest = max(remedies, key=lambda name: remedies[name][0])
        return (
            f"{self.n_waits:,} of {self.n_steps:,} steps waited for the writer thread, which was "
            f"busy {self.writer_share:.0%} of the time, mostly {slowest}: {remedies[slowest][1]}, "
            "or record fewer parameters"
        )

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote, by this version or by one that measured more or less."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})

    def to_json(self) -> dict[str, float]:
        """Return all but `n_bytes`, which the ledger has file by file; times to a microsecond."""
        content = asdict(self)
        del content["n_bytes"]
        return {name: round(value, 6) for name, value in content.items()}


class Stopwatch:
    """Measures an Overhead, lap by lap. It belongs to one thread."""

    def __init__(self) -> None:
        self._lap: dict[str, float] = {}

    def add(self, **amounts: float) -> None:
        """Add to fields of the lap."""
        for name, amount in amounts.items():
            self._lap[name] = self._lap.get(name, 0) + amount

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to a field."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - start_s})

    def time_each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Pass items on and add the seconds that it takes to make them to a field."""
        iterator = iter(items)
        while True:
            with self.time(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def lap(self) -> Overhead:
        """Return what was spent since the last lap, and begin the next one."""
        lap, self._lap = self._lap, {}
        return Overhead(**lap)  # type: ignore[arg-type]  # what is counted is an integer
