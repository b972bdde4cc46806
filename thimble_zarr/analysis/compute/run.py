"""Where the tasks of a reduction run: in forked processes, or on a Dask cluster.

There are as many processes as the memory allows. Not threads: a task makes thousands of calls of
some ten microseconds, and in threads Python's lock is handed over at each of them, which takes
longer. A forked process starts in milliseconds and shares what is imported.

Not Dask's local schedulers, either. All tokens of 600 steps of 10,000 x 64 replayed on two cores
take 7.2 s of CPU time in these processes, 10.0 s in Dask's threads, 10.6 s in its processes if they
are forked and 19 s if not, of which 2.6 s are to import Dask.
"""

import contextlib
import ctypes
import functools
import logging
import math
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

import numpy as np

from thimble_zarr.analysis.compute.memory import Needs, tasks_at_once
from thimble_zarr.analysis.compute.reduction import Reduction
from thimble_zarr.errors import ConfigError, ThimbleError

Progress = Callable[[int, int], object]
"""Called with how many tasks are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a reduction may use.

    Attributes
    ----------
    memory_bytes
        Bound on the memory of all processes together; None for a share of what is free.
    workers
        How many processes there may be; None for one for each CPU.
    scheduler
        Address of a Dask scheduler to use instead, whose workers have their own memory. Without
        any of the three an active `distributed.Client` is used.
    """

    memory_bytes: int | None = None
    workers: int | None = None
    scheduler: str | None = None


class Computation:
    """Numbers that others compute meanwhile; merged in the order of their tasks."""

    def __init__(self, reduction: Reduction, executor: Executor, progress: Progress | None) -> None:
        self._merge = reduction.statistics.merge
        self._waiting = deque(
            (int(rows[0]), deque(map(executor.submit, parts)))
            for rows, parts in zip(reduction.of_rows, reduction.parts(), strict=True)
        )
        self._merged: list[np.ndarray] = []
        self._progress = progress or (lambda n_done, n_tasks: None)
        self._n_done, self._n_tasks = 0, reduction.n_parts

    def reach(self, row: float) -> None:
        """Wait until what lies before a row was read: who reads it again waits for no disk."""
        while self._waiting and self._waiting[0][0] < row:
            self._merge_next()

    def result(self) -> np.ndarray:
        """Wait for all tasks and return the numbers, shape `(class, number, step)`."""
        self.reach(math.inf)
        return np.concatenate(self._merged, axis=-1)

    def _merge_next(self) -> None:
        _, tasks = self._waiting.popleft()
        numbers = (self._result(tasks.popleft()) for _ in range(len(tasks)))
        self._merged.append(functools.reduce(self._merge, numbers))

    def _result(self, task: "Future[np.ndarray]") -> np.ndarray:
        numbers = task.result()
        self._n_done += 1
        self._progress(self._n_done, self._n_tasks)
        return numbers


@contextlib.contextmanager
def computed(
    reduction: Reduction,
    resources: Resources,
    *,
    replay: bool = True,
    progress: Progress | None = None,
) -> Iterator[Computation]:
    """Have a reduction computed; `replay` says whether it takes steps again.

    Raises
    ------
    ConfigError
        If not even one task fits into the memory, the resources do not go together, or
        `distributed` is not installed.
    ThimbleError
        If processes were killed.
    """
    if resources.scheduler is not None:
        where = _connected(resources)
    elif resources == Resources() and (client := _active_client()):
        where = _on_cluster(client)
    else:
        needs = Needs.of(reduction, replay=replay)
        source = reduction.selected.source
        needs_torch = replay and source.program is None
        if replay and not source.reader.schema.optimizer.ELEMENTWISE:
            # Whole steps have threads of torch's own, which no forked process can use.
            resources = replace(resources, workers=1)
        where = processes(needs, resources, needs_torch=needs_torch)
    with where as executor:
        yield Computation(reduction, executor, progress)


@contextlib.contextmanager
def processes(
    needs: Needs, resources: Resources, *, needs_torch: bool = False
) -> Iterator[Executor]:
    """Fork processes, or start them anew where a server is read.

    They are threads where one is enough or none can be forked safely.

    Ctrl-C ends them after the tasks that were handed out, of which some wait. `needs_torch` says
    whether all will need torch.
    """
    most = min(resources.workers or n_cpus(), needs.n_tasks)
    n_tasks = tasks_at_once(needs, resources.memory_bytes, most, needs_torch=needs_torch)
    executor: Executor = ThreadPoolExecutor(n_tasks)
    if n_tasks > 1 and sys.platform == "linux":
        # What talks to servers has threads, without which a forked process would wait for ever.
        context = _Spawn() if "obstore" in sys.modules else get_context("fork")
        executor = ProcessPoolExecutor(n_tasks, context, initializer=_prepare_process)
    try:
        with warnings.catch_warnings():
            # Newer Pythons warn where there are other threads; ours hold no lock meanwhile.
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            executor.submit(int)  # the first task, whatever it is, forks them
        yield executor
    except BrokenExecutor as error:
        raise ThimbleError(
            f"a process of {needs.what} was killed, perhaps because memory ran out; "
            "set a lower limit (--memory)"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


class _SpawnedProcess(SpawnProcess):
    """A process that begins anew, and does not run the caller's script again.

    Tasks are functions of this package, so that nothing of the script is needed.
    """

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:  # multiprocessing's name
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = script


class _Spawn(SpawnContext):
    """What starts them."""

    Process = _SpawnedProcess


def _prepare_process() -> None:
    """Prepare a process: who forked it ends it, and its neighbours have the other CPUs."""
    from numcodecs import blosc

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    blosc.use_threads = False
    system = end_with_parent()
    # Arrays of a part come and go, and the system should not clear their pages each time.
    if hasattr(system, "mallopt"):
        for threshold in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            system.mallopt(threshold, _KEPT_BYTES)


def end_with_parent() -> ctypes.CDLL:
    """Have the system end this process when the one that forked it ends; return its library.

    Who is killed with SIGKILL ends nobody.
    """
    system = ctypes.CDLL(None)
    system.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return system


_PR_SET_PDEATHSIG, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = 1, -1, -3

_KEPT_BYTES = 2**25
"""Free memory that a process keeps: of larger arrays there are few."""


def n_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _active_client() -> Any:
    """Return the client of a Dask cluster that this process has connected to; None without one."""
    distributed = sys.modules.get("distributed")
    with contextlib.suppress(ValueError):
        return distributed and distributed.default_client()
    return None


@contextlib.contextmanager
def _connected(resources: Resources) -> Iterator[Executor]:
    """Connect to a scheduler, and keep to ourselves what Dask has to say of its workers."""
    address = resources.scheduler
    if (resources.workers, resources.memory_bytes) != (None, None):
        raise ConfigError(
            "--scheduler brings workers with their own memory: leave out --workers and --memory"
        )
    try:
        import distributed
    except ImportError as error:
        raise ConfigError(
            "--scheduler needs Dask's distributed; "
            "install it: pip install 'thimble-zarr[distributed]'"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable()
        try:  # not everyone's client: one that could not connect would be that, too
            client = stack.enter_context(distributed.Client(address, set_as_default=False))
        except ValueError as error:
            raise ConfigError(
                f"{address!r} is not the address of a scheduler, such as tcp://10.0.0.1:8786: "
                f"{error}"
            ) from error
        yield stack.enter_context(_on_cluster(client))


@contextlib.contextmanager
def _on_cluster(client: Any) -> Iterator[Executor]:
    from distributed import KilledWorker

    executor = client.get_executor(pure=False)
    try:
        yield executor
    except (KilledWorker, CancelledError) as error:
        raise ThimbleError(
            "the workers of the Dask cluster kept dying, perhaps because memory ran out, or it "
            f"went away: {error}"
        ) from error
    finally:
        executor.shutdown(wait=False)
