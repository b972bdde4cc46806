"""Tuning constants, which tests replace: sizes of pieces, and what is too little to be worth it.

No answer depends on them; a test holds that by replacing them all::

    monkeypatch.setattr("thimble_zarr.tuning.TUNING", replace(TUNING, task_steps=3))

So read them as `tuning.TUNING.task_steps` where they are needed, never at import.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Constants of speed, in elements, bytes, chunks or steps as their names say.

    Attributes
    ----------
    few_chunks
        Of fewer in a block the disk is not told: asking takes as long as to read them.
    remembered_selections
        Selections of tokens of which is remembered where they lie.
    told_bytes
        What Linux is told of at once: of more it may forget the rest (`read_ahead_kb`).
    """

    few_chunks: int = 4
    remembered_selections: int = 64
    told_bytes: int = 2**17

    near_bytes: int = 2**16
    """Gap in a row of somebody else's file that is read over: to seek takes as long."""

    requests_at_once: int = 16
    """Requests to a server that a process waits for at once."""

    request_bytes: int = 2**23
    """Bytes that a request to a server asks for at most, if there is more than one chunk in it."""

    opening_bytes: int = 2**16
    """Bytes of a file on a server that are asked for when it is opened: most files are smaller."""

    windows_ahead: int = 4
    """At most so many windows are announced ahead to a server; to a disk, only the next."""

    ahead_bytes: int = 2**26
    """Bytes of these windows, as they are decoded, unless one is larger."""

    served_block_bytes: int = 2**28
    """Bytes of a block, as they are decoded, up to which a task on a server has all tokens."""

    open_blocks: int = 64
    """Blocks on a server of which shards stay open: nothing is open but what was fetched ahead."""

    request_retries: int = 6
    """How often a request that failed is made again, after 0.1 s, 0.2 s, ... but at most 5 s."""

    request_timeout_s: float = 30.0
    """How long a server may take to answer a request."""

    upload_bytes: int = 5 * 2**20
    """Size of the parts in which a large file is uploaded: the minimum that S3 accepts."""

    upload_timeout_s: float = 300.0
    """How long a server may take to receive a part; four files are uploaded at once."""

    silence_s: float = 60.0
    """How long a recording that has ended waits for the next file, or part, to be published."""

    piece_characters: int = 2**14
    """Least length of the pieces of a text that are encoded: 16 at once take some 20 MB."""

    checkpoint_share: float = 0.005
    """Share of a run's time that taking checkpoints may have."""

    decoded_bytes: int = 2**26
    """Bytes of decoded chunks that who reads a predicted store keeps: those of a window."""

    window_elements: int = 2**21
    """Elements a window of several chunks: so many that reading and replay run at full speed."""

    row_elements: int = 2**19
    """Elements a row of it at most, where blocks are short: the replay's temporaries are of a row.
    """

    part_bytes: int = 2**19
    """Size of an array of numbers of a part, or up to a quarter more where that saves one."""

    cached_elements: int = 2**19
    """About the elements a window of several chunks where what was read is to stay in the cache."""

    task_steps: int = 256
    """Steps a task, in whole blocks. Each reads the row before its first, and so a block more."""

    summary_elements: int = 2**20
    """Numbers of a variable that a task of a summary writes at most: steps times tokens."""

    summary_part_bytes: int = 2**20
    """Size of an array of a part of a summary: it makes some hundred calls for each."""

    summary_held_bytes: int = 2**25
    """Weights of all tokens that a task of a summary holds at most, so as to read them once."""

    sample_elements: int = 2**19
    """Elements that causes are tried on; those that failed first are among them."""


TUNING = Tuning()
