"""Every error this package raises on purpose, so that callers can catch one tree.

Each error is also the built-in that fits it, so code that does not know this package still
catches it where it would expect to::

    ThimbleError
    ├── StoreError (OSError)              the store on disk
    │   ├── NotAStoreError                no store there, or something else
    │   ├── UnsupportedFormatError        written by a newer format version
    │   ├── DamagedStoreError             a committed file is missing, empty or fails its checksum
    │   ├── StoreLockedError              another process is recording into it
    │   └── DiskSpaceError                the disk cannot hold the run
    ├── StoreExistsError (FileExistsError) the path is taken
    ├── ConfigError (ValueError)          a setting that cannot work
    ├── CorpusError (ValueError)          corpus, tokenizer or token mask do not fit
    ├── SelectionError (ValueError)       tokens, steps or a parameter that are not there
    ├── OptimizerError (TypeError)        an optimizer or parameter that cannot be recorded
    ├── ResumeError (ValueError)          a run that is not the recorded one, or stands elsewhere
    └── RecordingError (RuntimeError)     the writer thread stopped; what is committed is safe
        └── AuditError                    a step that its optimizer does not explain

A message says what is wrong, what was expected and found, and what to do next. The module imports
nothing, and everything else may import it.
"""

TYPE_CHECKING = False  # as type checkers know it

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class ThimbleError(Exception):
    """The root of the tree: anything this package raises on purpose."""


class StoreError(ThimbleError, OSError):
    """The store on disk cannot be created, written or read."""


class NotAStoreError(StoreError):
    """The path holds no thimble-zarr store, and no file that is read like one."""


class UnsupportedFormatError(StoreError):
    """The store has a format version this release does not read."""


class DamagedStoreError(StoreError):
    """A committed part is missing, empty or fails its checksum, or a file was cut off."""


class StoreLockedError(StoreError):
    """Another process is recording into the store."""


class DiskSpaceError(StoreError):
    """The disk has not enough room for the planned run."""


class StoreExistsError(ThimbleError, FileExistsError):
    """The path exists and overwriting was not asked for, or would destroy something else."""


class ConfigError(ThimbleError, ValueError):
    """A setting, alone or beside the others, that cannot work."""


class CorpusError(ThimbleError, ValueError):
    """A corpus, tokenizer or token mask that cannot be read or does not fit the run."""


class SelectionError(ThimbleError, ValueError):
    """Tokens, steps or a parameter were asked for that the store does not have."""


class OptimizerError(ThimbleError, TypeError):
    """An optimizer or parameter that cannot be recorded."""


class ResumeError(ThimbleError, ValueError):
    """A store cannot be resumed: another run was recorded there, or it is at another step."""


class RecordingError(ThimbleError, RuntimeError):
    """Recording stopped because a block could not be written; committed steps are safe."""


class AuditError(RecordingError):
    """A step is not what its optimizer makes of the row before; it is recorded, as all others."""


MAX_LISTED = 8
"""Names that a message lists."""


def all_listed(names: "Sequence[object]") -> str:
    """Return names for a message, all of them.

    Examples
    --------
    >>> all_listed("abc")
    'a, b and c'
    """
    *others, last = map(str, names)
    return f"{', '.join(others)} and {last}" if others else last


def listed(names: "Iterable[object]", *, most: int = MAX_LISTED, hint: str = "") -> str:
    """Return names for a message: of many the first, how many more there are, and a hint.

    Examples
    --------
    >>> listed("abc", most=2)
    'a, b and 1 more'
    """
    known = [str(name) for name in names]
    more = f" and {len(known) - most:,} more{hint}" if len(known) > most else ""
    return ", ".join(known[:most]) + more
