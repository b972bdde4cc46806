"""A call in a process of its own, while this process does something else."""

import contextlib
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from thimble_zarr.analysis.compute.run import Progress, end_with_parent, n_cpus
from thimble_zarr.errors import ThimbleError

T = TypeVar("T")

Call = Callable[[Progress], T]
"""Is told whom to tell how far it is, and returns a result."""


@contextlib.contextmanager
def aside(call: Call[T], what: str) -> Iterator[Call[T]]:
    """Run a call in a forked process, and yield what waits for its result, or raises its error.

    The process ends with the block. Where none can be forked safely, or there is only one CPU, the
    call is made when its result is asked for.

    Parameters
    ----------
    call
        What is called.
    what
        What it is, for the message if its process is killed.
    """
    if not _can_fork():
        yield call
        return
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(call, sender))
    try:  # around the start, too: an interrupt right after it must leave no process behind
        with warnings.catch_warnings():
            # Newer Pythons warn where there are other threads; ours hold no lock meanwhile.
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            process.start()
        sender.close()
        yield partial(_result, receiver, what)
    finally:
        if process.pid is not None:
            process.terminate()
            process.join()
        receiver.close()


def _can_fork() -> bool:
    """Return whether a process can be forked in which torch will work.

    If torch was used before, its threads and what it holds on a GPU do not survive that, nor do
    those that read from a server. And who is connected to a Dask cluster wants the call made there.
    """
    is_known = {"torch", "distributed", "obstore"} & sys.modules.keys()
    return sys.platform == "linux" and not is_known and n_cpus() > 1


def _run(call: Call[object], sender: Connection) -> None:
    """Make the call, and send how far it is and what came of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    try:
        result = call(lambda *n: sender.send((_PROGRESS, n)))
    except Exception as error:
        sender.send((_ERROR, _portable(error)))
    else:
        sender.send((_RESULT, result))


def _portable(error: Exception) -> Exception:
    """Return an error that the other process can raise: not every one can be pickled, and back."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


_PROGRESS, _RESULT, _ERROR = range(3)


def _result(receiver: Connection, what: str, progress: Progress) -> Any:
    """Wait for what came of the call."""
    try:
        while True:
            kind, value = receiver.recv()
            if kind == _ERROR:
                raise value
            if kind == _RESULT:
                return value
            progress(*value)
    except EOFError as error:
        raise ThimbleError(
            f"the process of {what} was killed, perhaps because memory ran out"
        ) from error
