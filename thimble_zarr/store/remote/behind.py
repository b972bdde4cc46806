"""A process that publishes a store behind who records it.

Not a thread: hashing and reading a ledger would take Python's lock from training again and again.
And what a run committed before it was killed is published all the same.

What starts it writes a line to its stdin when the recording has ended, and then it copies what is
left and ends. So it does, too, when who started it is gone. SIGTERM does not end it: a scheduler
sends that to all processes of a job, and training may yet commit. It tells in lines of JSON on
stdout what it does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any

from thimble_zarr import tuning
from thimble_zarr.errors import NotAStoreError, ThimbleError
from thimble_zarr.format.location import Url
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.files.objects import ObjectFiles
from thimble_zarr.store.remote import following
from thimble_zarr.store.remote.copying import Copied
from thimble_zarr.store.remote.target import Server

_PROGRAM = """\
import json, sys
asked = json.loads(sys.argv[1])
sys.path += [path for path in asked.pop("path") if path not in sys.path]
from thimble_zarr.store.remote.behind import publish_behind
publish_behind(**asked)
"""

_NICE = 10
"""How far training comes first where both want a core."""


class Publisher:
    """Publishes a store in a process of its own, from now on. Nothing here waits but `finish`.

    Attributes
    ----------
    n_rows
        Rows that are published, as far as it has told.
    problem
        What is wrong now, in words; empty if nothing is.
    has_ended
        Whether it publishes nothing more.
    """

    def __init__(self, store: Path, url: Url) -> None:
        asked: dict[str, Any] = {"path": sys.path, "store": str(store), "url": str(url)}
        asked |= {"constants": asdict(tuning.TUNING), "poll_s": following.POLL_S}
        self._process = subprocess.Popen(
            # -P: a file of the current directory that has the name of a module is not imported.
            [sys.executable, "-P", "-c", _PROGRAM, json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for who trains
        )
        self.n_rows, self.problem = 0, ""
        self.has_ended = False
        self._news: deque[str] = deque()
        self._why_killed, self._heard_s = "the process that publishes was killed", 0.0
        self._listener = Thread(target=self._listen, name="thimble-zarr-publisher", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    def news(self) -> Iterator[str]:
        """Yield the problems that it has come upon since the last call."""
        while self._news:
            yield self._news.popleft()

    def finish(self) -> None:
        """Say that the recording has ended, and wait until all is published, or cannot be.

        If no file, or part of one, arrives for `TUNING.silence_s`, the process is killed: the
        server hangs. Ctrl-C ends the wait, and the process goes on publishing.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.write(b"ended\n")
            self._process.stdin.close()
        self._heard_s, silence_s = time.monotonic(), tuning.TUNING.silence_s
        while self._listener.is_alive():
            left_s = self._heard_s + silence_s - time.monotonic()
            if left_s <= 0:
                self._why_killed = f"nothing more arrived there for {silence_s:g} s"
                self._process.kill()
            self._listener.join(left_s if left_s > 0 else None)
        self._process.wait()
        self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told, self._heard_s = json.loads(line), time.monotonic()
            if "n_bytes" in told:  # it is alive
                continue
            self.n_rows = told.get("n_rows", self.n_rows)
            self._note(told.get("problem", ""), has_ended=told.get("has_ended", False))
        if not self.has_ended:  # else it has told how it ended
            self._note(self._why_killed, has_ended=True)

    def _note(self, problem: str, *, has_ended: bool) -> None:
        self.problem, self.has_ended = problem, has_ended
        if problem:
            self._news.append(problem)


def publish_behind(store: str, url: str, *, constants: dict[str, Any], poll_s: float) -> None:
    """Publish a store until a line comes from stdin, or what started this process is gone."""
    tuning.TUNING, following.POLL_S = tuning.Tuning(**constants), poll_s
    ended, parent = Event(), os.getppid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Thread(target=_wait_for_line, args=[ended], daemon=True).start()
    with suppress(OSError, AttributeError):
        os.nice(_NICE)

    def is_over() -> bool:
        return ended.is_set() or os.getppid() != parent

    def wait(seconds: float) -> None:
        while seconds > 0 and not is_over():
            ended.wait(min(seconds, 1.0))
            seconds -= 1.0

    with closing(Server(ObjectFiles(Url(url)))) as server:
        problem = _followed(Path(store), server, is_over, wait)
        # Told before the claim is given back: whether that succeeds, all is there.
        _tell(problem=problem, has_ended=True)


def _followed(
    store: Path, server: Server, is_over: Callable[[], bool], wait: Callable[[float], None]
) -> str:
    """Publish a store until its recording has ended; return what is wrong, in words."""
    try:
        following.follow(
            LocalFiles(store),
            server,
            Copied(),
            progress=lambda done, total: _tell(n_bytes=done) if is_over() else None,
            ended=is_over,
            wait=wait,
            on_commit=lambda copied: _tell(n_rows=copied.n_rows),
            on_problem=lambda error: _tell(problem=str(error)),
            gives_up=True,
        )
    except NotAStoreError:
        pass  # it was removed, as one without a row is
    except ThimbleError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _wait_for_line(ended: Event) -> None:
    sys.stdin.readline()
    ended.set()


def _tell(**what: object) -> None:
    with suppress(OSError):  # nobody listens any more
        print(json.dumps(what), flush=True)
