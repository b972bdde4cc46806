"""Progress on stderr: a bar on a terminal, elsewhere a plain line every few seconds."""

import sys
from typing import Any

from tqdm import tqdm

LINE_INTERVAL_S = 5.0
"""Seconds between two lines where stderr is no terminal, and before the first."""


class Progress(tqdm):  # type: ignore[type-arg]  # it is generic for type checkers only
    """What a command is doing, and how far it is: `with progress(...) as bar: bar.update()`."""

    monitor_interval = 0
    """No thread that watches the bar: commands fork processes, and each update shows itself."""

    def __str__(self) -> str:
        return super().__str__() if self.unit else f"{self._doing} ..."

    @property
    def _doing(self) -> str:
        return str(self.desc.removesuffix(": "))

    def reach(self, n_done: int, n_total: int) -> None:
        """Show that so much is done of so much."""
        self.total = n_total
        self.update(n_done - self.n)

    def note(self, text: str) -> None:
        """Show a text beside the numbers from the next update on."""
        self.set_postfix_str(text, refresh=False)


class _Lines(Progress):
    """Progress for a log: no control characters, and a line only every few seconds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, delay=LINE_INTERVAL_S, mininterval=LINE_INTERVAL_S)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line, but none where tqdm would wipe a bar off the screen."""
        if msg is None:
            print(self, file=self.fp, flush=True)

    def __str__(self) -> str:
        if not self.unit:
            return super().__str__()
        done, total = self._amount(self.n), "" if self.total is None else self._amount(self.total)
        unit = "" if self.unit == "B" else f" {self.unit}s"
        of = f" of {total}{unit} ({self.n / self.total:.0%})" if self.total else unit
        elapsed_s = self.format_dict["elapsed"]
        note = f", {self.postfix}" if self.postfix else ""
        return f"{self._doing}: {done}{of}, {elapsed_s:.0f} s{note}"

    def _amount(self, n: float) -> str:
        return f"{self.format_sizeof(n)}B" if self.unit == "B" else f"{n:,}"


def progress(
    doing: str, *, unit: str = "", total: int | None = None, quiet: bool = False
) -> Progress:
    """Begin to show progress on stderr: at once on a terminal, elsewhere after some seconds.

    `unit` is what is counted, in the singular, "B" for bytes, which are shown as MB and GB. If it
    is empty, only what is done is shown (`doing`, such as "checking").
    """
    kind: type[Progress] = Progress if sys.stderr.isatty() else _Lines
    options: Any = {"unit": unit, "unit_scale": unit == "B", "leave": False, "miniters": 1}
    return kind(desc=doing, total=total, disable=quiet, **options)
