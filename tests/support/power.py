"""A disk that loses its power: what the system was asked for, and what of it may be left.

Content that was not fsynced may be gone or cut off, and so may every name that was given or taken
in a directory that was not fsynced since, each for itself.
"""
# It stands in for `os`.
# ruff: noqa: PTH102, PTH105, PTH108, PTH110, PTH112, PTH118, PTH119

import os
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

POLICIES = ("nothing", "names", "content", "some", "torn")
"""What is left of what was not synced: nothing, all names with no content, all content without a
name, some of both, and all names with half of the content."""


@dataclass
class Call:
    """Something the system was asked for.

    `file` is the number of a file, `directory` and `name` are where.
    """

    kind: str
    file: int = -1
    directory: str = ""
    name: str = ""
    content: bytes = b""
    offset: int = 0


@dataclass
class LoggedOs:
    """Stands in for `os` in `format.disk`: does what is asked, but for waiting, and keeps a log."""

    log: list[Call] = field(default_factory=list)
    _files: dict[str, int] = field(default_factory=dict)
    _open: dict[int, tuple[str, int]] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def note(self, what: str) -> None:
        """Put a mark into the log."""
        with self._lock:
            self.log.append(Call("note", name=what))

    def open(self, path: Path, flags: int) -> int:
        path = str(path)
        is_new = not os.path.exists(path)
        descriptor = os.open(path, flags)
        with self._lock:
            if os.path.isdir(path):
                self._open[descriptor] = (path, -1)
                return descriptor
            if is_new:
                self._files[path] = len(self.log)
                self.log.append(Call("name", self._files[path], *os.path.split(path)))
            elif flags & os.O_TRUNC:
                # Its old content is gone for whoever has it open; a new one begins.
                self.log.append(Call("cut", self._files[path]))
            self._open[descriptor] = (path, self._files[path])
            self._offsets[descriptor] = 0
        return descriptor

    def write(self, descriptor: int, content: bytes) -> int:
        n_bytes = os.write(descriptor, content)
        with self._lock:
            offset = self._offsets[descriptor]
            self._offsets[descriptor] += n_bytes
            written = bytes(content[:n_bytes])
            self.log.append(
                Call("write", self._open[descriptor][1], content=written, offset=offset)
            )
        return n_bytes

    def lseek(self, descriptor: int, offset: int, how: int) -> int:
        self._offsets[descriptor] = offset
        return os.lseek(descriptor, offset, how)

    def ftruncate(self, descriptor: int, n_bytes: int) -> None:
        os.ftruncate(descriptor, n_bytes)
        with self._lock:
            self.log.append(Call("cut", self._open[descriptor][1], offset=n_bytes))

    def fsync(self, descriptor: int) -> None:
        with self._lock:
            path, file = self._open[descriptor]
            kind = "sync directory" if file == -1 else "sync"
            self.log.append(Call(kind, file, directory=path if file == -1 else ""))

    def close(self, descriptor: int) -> None:
        with self._lock:
            self._open.pop(descriptor)
        os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)
        with self._lock:
            file = self._files[str(target)] = self._files.pop(str(source))
            directory, name = os.path.split(target)
            self.log.append(Call("unname", file, directory, os.path.basename(source)))
            self.log.append(Call("name", file, directory, name))

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)
        with self._lock:
            self.log.append(Call("mkdir", -1, *os.path.split(path)))

    def unlink(self, path: Path) -> None:
        os.unlink(path)
        with self._lock:
            self.log.append(Call("unname", self._files.pop(str(path), -1), *os.path.split(path)))


Files = dict[str, bytes]


def left_after(log: list[Call], policy: str, seed: int) -> Files:
    """Return the files that a power loss behind the log leaves, by their paths."""
    rng = random.Random(seed)
    now: dict[int, bytearray] = {}
    safe: dict[int, bytes] = {}
    names: dict[str, dict[str, int]] = {}
    pending: dict[str, list[Call]] = {}
    for call in log:
        if call.kind == "write":
            content = now.setdefault(call.file, bytearray())
            content[call.offset : call.offset + len(call.content)] = call.content
        elif call.kind == "cut":
            del now.setdefault(call.file, bytearray())[call.offset :]
        elif call.kind == "sync":
            safe[call.file] = bytes(now.get(call.file, b""))
        elif call.kind in ("name", "unname", "mkdir"):
            pending.setdefault(call.directory, []).append(call)
        elif call.kind == "sync directory":
            for made in pending.pop(call.directory, []):
                _apply(names, made)
    for calls in pending.values():
        for call in calls:
            if policy in ("names", "torn") or (policy == "some" and rng.random() < 0.5):
                _apply(names, call)
    made = {os.path.join(call.directory, call.name) for call in log if call.kind == "mkdir"}

    def exists(directory: str) -> bool:
        """Whether a directory was there before, or its name is safe, and that of all above it."""
        above, name = os.path.split(directory)
        return directory not in made or (names.get(above, {}).get(name) == -1 and exists(above))

    return {
        os.path.join(directory, name): _left(
            policy, rng, safe.get(file, b""), bytes(now.get(file, b""))
        )
        for directory, entries in names.items()
        if exists(directory)
        for name, file in entries.items()
        if file != -1
    }


def _apply(names: dict[str, dict[str, int]], call: Call) -> None:
    entries = names.setdefault(call.directory, {})
    if call.kind == "unname":
        if entries.get(call.name) == call.file or call.file == -1:
            entries.pop(call.name, None)
    else:
        entries[call.name] = call.file


def _left(policy: str, rng: random.Random, safe: bytes, now: bytes) -> bytes:
    if policy == "torn":
        return now if now == safe else now[: (len(safe) + len(now)) // 2]
    if policy == "content" or (policy == "some" and rng.random() < 0.5):
        return now
    return safe


def lay_out(files: Files, root: Path, target: Path) -> None:
    """Write the files that lie below `root` to `target`."""
    for path, content in files.items():
        if Path(path).is_relative_to(root):
            file = target / Path(path).relative_to(root)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
