"""A run that is looked at while it is recorded: snapshots, each of what was committed by then."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from thimble_zarr.analysis.compute.run import Progress
from thimble_zarr.analysis.dataset.open import dataset_of
from thimble_zarr.analysis.summary.summary import summary as sum_up
from thimble_zarr.format.reader import Reader, State
from thimble_zarr.report.figure import Panel
from thimble_zarr.report.run import Run
from thimble_zarr.report.view.tokens import Tokens


@dataclass(frozen=True)
class Snapshot:
    """A run as far as it was committed at one moment. Browser tabs share it.

    Attributes
    ----------
    run
        What panels read.
    reader
        What the run was read with.
    state
        Whether it was being recorded.
    """

    run: Run
    reader: Reader
    state: State
    _panels: dict[str, Panel] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @cached_property
    def tokens(self) -> Tokens:
        """What is known of the tokens."""
        return Tokens(self.run)

    @property
    def last_step(self) -> int:
        """The last committed step."""
        return int(self.run.ds.step.values[-1])

    def panel(self, name: str, make: Callable[[Run], Panel]) -> Panel:
        """Return a panel, computed when it is first asked for."""
        with self._lock:
            if name not in self._panels:
                self._panels[name] = make(self.run)
            return self._panels[name]

    def in_words(self) -> str:
        """Return how far the run is."""
        words = {
            State.CLOSED: "ended",
            State.RECORDING: "recording",
            State.UNKNOWN: "recording, or cut off",
            State.CUT_OFF: "cut off",
        }
        return f"{words[self.state]}, step {self.last_step:,}"


class Live:
    """A run of which there may be more rows at any time.

    Parameters
    ----------
    store
        Its path, as people wrote it.
    parameter
        The name of the parameter, where the store has several; else empty.
    reopen
        Opens the recording anew, and sees what is committed by then. Cheap.
    groups
        Groups of tokens besides dead, live and all (`thimble_zarr.summary`).
    """

    def __init__(
        self,
        store: str,
        parameter: str,
        reopen: Callable[[], Reader],
        groups: Mapping[str, str],
    ) -> None:
        self.store, self.parameter = store, parameter
        self._reopen, self._groups = reopen, groups
        self._advancing = threading.Lock()
        self._snapshot: Snapshot | None = None

    @property
    def name(self) -> str:
        """What it is called among others."""
        return f"{self.store}: {self.parameter}" if self.parameter else self.store

    @property
    def is_ready(self) -> bool:
        """Whether there is a snapshot."""
        return self._snapshot is not None

    @property
    def snapshot(self) -> Snapshot:
        """The newest there is; the first is made now."""
        return self._snapshot or self.advance()

    def is_behind(self) -> bool:
        """Return whether more was committed, or the recording ended, since the newest snapshot."""
        now, reader = self._snapshot, self._reopen()
        return now is None or _extent(reader) != (now.reader.n_rows, now.state)

    def advance(self, *, progress: Progress | None = None) -> Snapshot:
        """Return a snapshot of what is committed now; takes as long as the summary of what is new.

        Threads that ask at the same time get the same one. The first time processes are forked, so
        do that before there are threads.
        """
        with self._advancing:
            before, reader = self._snapshot, self._reopen()
            n_rows, state = _extent(reader)
            if before is not None and (before.reader.n_rows, before.state) == (n_rows, state):
                return before
            ds = dataset_of(reader)
            workers = None if before is None else 1
            summary = sum_up(ds, groups=self._groups, workers=workers, progress=progress)
            # What is not by step is small, and read again and again.
            small = [name for name, of in summary.data_vars.items() if "step" not in of.dims]
            summary = summary.assign({name: summary[name].compute() for name in small})
            run = Run(store=self.store, ds=ds, summary=summary)
            self._snapshot = Snapshot(run, reader, state)
            return self._snapshot


def _extent(reader: Reader) -> tuple[int, State]:
    return reader.n_rows, reader.recording.state
