"""Where the tasks of a check run: processes here, or workers of a Dask cluster.

They are as many as the memory allows. Not threads: a task makes thousands of calls of some ten
microseconds, and in threads Python's lock is handed over at each of them, which takes longer; two
threads are no faster than one. A forked process starts in milliseconds and shares what is imported;
it is forked before what only the report needs, which is imported while it computes. The scheduling
on a cluster is Dask's.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thimble_zarr.cli.options import Size
from thimble_zarr.errors import ConfigError, ThimbleError

if TYPE_CHECKING:
    import numpy as np

    from thimble_zarr.analysis.compute.budget import Needs
    from thimble_zarr.analysis.compute.reduction import Reduction
    from thimble_zarr.cli.progress import Progress

_FREE_SHARE = 4, 5
"""Of the free memory a check takes four fifths at most, unless it is told how much."""

_FIRST_USE_BYTES = 32 * 10**6
"""What libraries still take when they are first used, measured on Linux."""

_REPORT_BYTES = 44 * 10**6
"""What pandas takes, which most reports need, when it is imported, measured on Linux."""

_WORKER_BYTES = 350 * 10**6
"""A worker process with Dask and torch and nothing to do, measured on Linux."""

_INTERVAL_S = 0.2

_CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux keeps the quotas of groups of processes."""

_OWN_CGROUP = Path("/proc/self/cgroup")
"""Where it says of which group this process is."""

_CGROUPS_V1 = "cpu,cpuacct", "cpuacct,cpu"


@dataclass(frozen=True)
class Computed:
    """Numbers that others compute meanwhile.

    Attributes
    ----------
    result
        Waits for all of them and returns them, shape `(class, number, step)`.
    reach
        Waits until what lies before a row was read, so that whoever reads it again need not wait
        for the disk. Of a cluster that is not known, and nothing waits.
    """

    result: Callable[[], "np.ndarray"]
    reach: Callable[[int], None]


@contextlib.contextmanager
def computed(
    reduction: "Reduction",
    *,
    memory_bytes: int | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    replay: bool = True,
    quiet: bool = False,
) -> Iterator[Computed]:
    """Have a reduction computed, with progress on stderr.

    Parameters
    ----------
    reduction
        What to compute.
    memory_bytes
        Bound on the memory of all processes together; by default a share of what is free. With a
        scheduler the memory is its workers' own affair.
    workers
        Workers of a cluster to start here, of one thread each; by default forked processes, or
        threads where processes cannot be forked safely.
    scheduler
        Address of a Dask scheduler to use instead.
    replay
        Whether torch will be needed.
    quiet
        Show no progress.

    Yields
    ------
    Computed
        The numbers.

    Raises
    ------
    ConfigError
        If these do not go together, not even one task fits into the memory, or `distributed` is not
        installed.
    ThimbleError
        If the workers failed.
    """
    from thimble_zarr.analysis.compute.budget import Needs
    from thimble_zarr.cli.progress import progress

    if scheduler is not None and (workers, memory_bytes) != (None, None):
        raise ConfigError(
            "--scheduler brings workers with their own memory: leave out --workers and --memory"
        )
    needs = Needs.of(reduction, replay=replay)
    bar = progress("checking", unit="part", total=reduction.n_parts, quiet=quiet)
    if workers is None and scheduler is None:
        with bar, _executor(needs, memory_bytes, replay=replay) as executor:
            tasks = _Tasks(reduction, executor, bar)
            yield Computed(tasks.result, tasks.reach)
        return
    distributed = _distributed()
    with bar, _without_logs(), contextlib.ExitStack() as stack:
        if workers is not None:
            _fits(needs, memory_bytes, workers, replay=replay)
            scheduler = stack.enter_context(_cluster(distributed, workers))
        client = stack.enter_context(_connected(distributed, scheduler))
        try:
            future = client.compute(_as_dask(reduction))
            yield Computed(lambda: _from_cluster(client, future, bar), lambda row: None)
        except distributed.KilledWorker as error:
            raise ThimbleError(
                f"worker processes kept dying, perhaps because memory ran out: {error}"
            ) from error


class _Tasks:
    """The tasks of a reduction, waited for in their order; merged a few at a time, and forgotten.

    Parameters
    ----------
    reduction
        What is computed.
    executor
        Where.
    bar
        Shows how many are done.
    """

    def __init__(self, reduction: "Reduction", executor: Executor, bar: "Progress") -> None:
        self._reduction = reduction
        self._waiting: deque[tuple[int, list[Future[np.ndarray]]]] = deque(
            (int(rows[0]), [executor.submit(part) for part in parts])
            for rows, parts in zip(reduction.of_rows, reduction.parts(), strict=True)
        )
        self._merged: list[np.ndarray] = []
        self._bar = bar

    def reach(self, row: int) -> None:
        """Wait for the tasks that begin before a row."""
        while self._waiting and self._waiting[0][0] < row:
            self._merge_next()

    def result(self) -> "np.ndarray":
        """Wait for all tasks and return the numbers."""
        import numpy as np

        while self._waiting:
            self._merge_next()
        return np.concatenate(self._merged, axis=-1)

    def _merge_next(self) -> None:
        from thimble_zarr.analysis.compute.reduction import by_fan_in

        groups, numbers = by_fan_in(self._waiting.popleft()[1]), []
        while groups:
            numbers.append(self._reduction.statistics.merge(*map(self._result, groups.pop(0))))
        self._merged.append(self._reduction.merged(numbers))

    def _result(self, task: "Future[np.ndarray]") -> "np.ndarray":
        numbers = task.result()
        self._bar.update()
        return numbers


def _as_dask(reduction: "Reduction") -> Any:
    from thimble_zarr.analysis.dataset.lazy import as_dask

    return as_dask(reduction)


def _from_cluster(client: Any, future: Any, bar: "Progress") -> "np.ndarray":
    """Wait for what a cluster computes."""
    with _remote_progress(client, bar):
        numbers: np.ndarray = future.result()
    return numbers


@contextlib.contextmanager
def _executor(needs: "Needs", memory_bytes: int | None, *, replay: bool) -> Iterator[Executor]:
    """Return processes to compute in, or threads where one is enough or none can be forked.

    Those, too, end the task they are at.
    """
    n_tasks = _n_at_once(needs, memory_bytes, min(n_cpus(), needs.n_tasks), replay=replay)
    if n_tasks > 1 and sys.platform == "linux":
        with _forked(n_tasks) as processes:
            yield processes
        return
    threads = ThreadPoolExecutor(n_tasks)
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def n_cpus() -> int:
    """Return how many CPUs this process may use.

    Of rations Dask knows; importing it where there are none would be a third of the start-up.
    """
    if sys.platform == "linux" and not _are_rationed():
        return len(os.sched_getaffinity(0))
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


def _are_rationed() -> bool:
    """Return whether there may be a quota on the CPUs of this process, as containers have."""
    try:
        group = _OWN_CGROUP.read_text().strip().rpartition(":")[2].strip("/")
    except OSError:
        return True  # that is not known
    quotas = [
        _CGROUPS / group / "cpu.max",
        *(_CGROUPS / v1 / "cpu.cfs_quota_us" for v1 in _CGROUPS_V1),
    ]
    for quota in quotas:
        with contextlib.suppress(OSError):
            return not quota.read_text().startswith(("max", "-1"))
    return False


@contextlib.contextmanager
def _forked(n_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Fork processes; Ctrl-C ends them after the tasks that were handed out, of which some wait."""
    processes = ProcessPoolExecutor(n_processes, get_context("fork"), initializer=_alone)
    try:
        with warnings.catch_warnings():
            # Newer Pythons warn where there are other threads; ours hold no lock meanwhile.
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            processes.submit(int)  # the first task, whatever it is, forks them
        yield processes
    except BrokenProcessPool as error:
        raise ThimbleError(
            "a process of the check was killed, perhaps because memory ran out; "
            "set a lower limit (--memory)"
        ) from error
    finally:
        processes.shutdown(cancel_futures=True)


def _alone() -> None:
    """Prepare a forked process: who forked it ends it, and its neighbours have the other CPUs."""
    from numcodecs import blosc

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    blosc.use_threads = False


def _fits(needs: "Needs", memory_bytes: int | None, workers: int, *, replay: bool) -> None:
    """Raise ConfigError, or warn, unless so many worker processes fit into the memory."""
    of_all = workers * (_WORKER_BYTES + needs.task_bytes)
    _n_at_once(replace(needs, task_bytes=of_all), memory_bytes, 1, replay=replay)


def _n_at_once(needs: "Needs", memory_bytes: int | None, most: int, *, replay: bool) -> int:
    """Return how many tasks fit. Memory that is only short just now is worth a warning."""
    import psutil

    if replay:
        import torch  # noqa: F401  # what it takes counts
    held_bytes = psutil.Process().memory_info().rss + _FIRST_USE_BYTES
    if "pandas" not in sys.modules:
        held_bytes += _REPORT_BYTES
    if memory_bytes is not None:
        return needs.n_at_once(memory_bytes, held_bytes, most)
    share, whole = _FREE_SHARE
    free_bytes = psutil.virtual_memory().available * share // whole
    try:
        return needs.n_at_once(held_bytes + free_bytes, held_bytes, most)
    except ConfigError as error:
        warnings.warn(f"memory is short: {error}", stacklevel=2)
        return 1


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise ConfigError(
            "--workers and --scheduler need Dask's distributed; "
            "install it: pip install 'thimble-zarr[distributed]'"
        ) from error
    return distributed


_FOR_WORKERS = {
    # It looks at each worker a hundred times a second, for a dashboard that nobody sees.
    "distributed.worker.profile.enabled": False,
    # Dask has memory given back at once. A task takes the same some MB again and again, and to get
    # them from the system each time takes longer than what it does with them.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 2**28,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 2**25,
}


def _cluster(distributed: Any, workers: int) -> Any:
    """Start worker processes that Ctrl-C does not reach, so that who started them ends them."""
    import dask

    with dask.config.set(_FOR_WORKERS), _quiet_resource_tracker(), _ctrl_c_later():
        return distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=":0",  # any port that is free
            memory_limit=0,  # what a task takes is known beforehand
            silence_logs=logging.CRITICAL,
        )


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Let Ctrl-C wait until a cluster is whole, and keep it from the processes that it starts.

    A terminal sends it to all of them. A signal that is blocked stays so in the threads that are
    started here, and in the processes that those start, then and later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    blocked = hasattr(signal, "pthread_sigmask")
    if blocked:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if blocked:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _quiet_resource_tracker() -> Iterator[None]:
    """Keep Python from warning of the semaphores of a worker that was ended while it computed.

    Its resource tracker removes them all the same; its filters come from the environment. It is
    started first, because its start lets blocked signals through.
    """
    before = os.environ.get("PYTHONWARNINGS")
    ignore = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = f"{before},{ignore}" if before else ignore
    try:
        if os.name == "posix":
            resource_tracker.ensure_running()
        yield
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _connected(distributed: Any, scheduler: Any) -> Any:
    try:
        # Not everyone's client: one that could not connect would be that, too.
        return distributed.Client(scheduler, set_as_default=False)
    except ValueError as error:
        raise ConfigError(
            f"{scheduler!r} is not the address of a scheduler, such as tcp://10.0.0.1:8786: {error}"
        ) from error


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
    """Keep to ourselves what Dask has to say of workers that come and go."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _remote_progress(client: Any, bar: "Progress") -> Iterator[None]:
    """Show progress by asking the scheduler: Dask's callbacks know of local threads only."""
    if bar.disable:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_INTERVAL_S):
            try:
                bar.reach(*client.run_on_scheduler(_finished))
            except OSError:  # it went away; whoever waits for its answer will say so
                return

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _finished(dask_scheduler: Any) -> tuple[int, int]:
    """Return how many tasks of checks are finished, and how many there are."""
    finished = total = 0
    for name, group in dask_scheduler.task_groups.items():
        if name.startswith("statistics-"):
            total += sum(group.states.values())
            finished += sum(group.states[state] for state in ("memory", "released", "forgotten"))
    return finished, total


def scheduling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--memory`, `--workers` and `--scheduler`."""
    for option in reversed(
        (
            click.option(
                "--memory",
                "memory_bytes",
                type=Size(),
                help="Limits the memory of all processes together.  [default: four fifths of what "
                "is free]",
            ),
            click.option(
                "--workers",
                type=click.IntRange(min=1),
                help="Start a Dask cluster of this many processes.  [default: no cluster, but a "
                "forked process for each CPU]",
            ),
            click.option(
                "--scheduler",
                metavar="ADDRESS",
                help="Use the Dask cluster of this scheduler, such as tcp://10.0.0.1:8786. Its "
                "workers must see STORE at the same path.",
            ),
        )
    ):
        command = option(command)
    return command
