"""Text to train on: any file, or the default that every Python carries.

The default corpus is made of the standard library's documentation: every docstring of its modules
and the topics of `pydoc`. The default tokenizer is trained on the sources of the same modules, code
included, so that a part of its vocabulary never occurs in the corpus: dead tokens, as in the
original experiment. Sources differ between Python versions; the recorded sha256 tells which.
What cannot be read, written or found raises CorpusError.
"""

import ast
import hashlib
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from thimble_zarr.errors import CorpusError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"}
_LEAST_SOURCE_BYTES = 2**20
_CHUNK_CHARACTERS = 2**16


@dataclass(frozen=True)
class Corpus:
    """A text in a file, which may be larger than the memory, and what to call it."""

    name: str
    file: Path

    def chunks(self, checksum: "hashlib._Hash | None" = None) -> Iterator[str]:
        """Yield the text in chunks, with line ends as Python reads them.

        `checksum` is updated with the text in UTF-8, because a pipe can be read only once.
        """
        try:
            with self.file.open(encoding="utf-8") as stream:
                while chunk := stream.read(_CHUNK_CHARACTERS):
                    if checksum is not None:
                        checksum.update(chunk.encode())
                    yield chunk
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"cannot read the corpus {self.file}: it is not UTF-8 text ({error}); convert it, "
                "for example with iconv"
            ) from error
        except OSError as error:
            raise CorpusError(f"cannot read the corpus {self.file}: {error.strerror}") from error

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return self.file.stat().st_size


def read_corpus(file: Path | None) -> Corpus:
    """Return the text in a file, which is not read yet, or the default corpus."""
    if file is None:
        return default_corpus()
    if file.is_dir():
        raise CorpusError(
            f"cannot read the corpus {file}: it is a directory; give a text file, for example all "
            "texts of the directory in one file"
        )
    if not file.exists():
        raise CorpusError(f"cannot read the corpus {file}: there is no such file")
    return Corpus(str(file), file)


def default_corpus() -> Corpus:
    """Return the documentation in the standard library; kept in the user's cache."""
    name = f"documentation of the Python {platform.python_version()} standard library"
    return Corpus(name, cached("corpus.txt", _documentation))


def stdlib_sources() -> list[Path]:
    """Return the standard library's source files but for its tests, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        file for file in root.rglob("*.py") if not _LEFT_OUT & set(file.relative_to(root).parts)
    )
    if sum(file.stat().st_size for file in files) < _LEAST_SOURCE_BYTES:
        raise CorpusError(
            f"this Python has no standard library sources in {root}, so there is no default "
            "corpus; give --corpus FILE and --tokenizer FILE"
        )
    return files


def read_source(file: Path) -> str:
    """Return a source file as text; undecodable bytes are replaced."""
    return file.read_text(encoding="utf-8", errors="replace")


def cached(name: str, make: Callable[[], str]) -> Path:
    """Return a file of the user's cache, for this Python, made where there is none."""
    version = f"python-{platform.python_version()}"
    file = Path(platformdirs.user_cache_dir("thimble-zarr")) / version / name
    try:
        with file.open("rb"):
            return file
    except (FileNotFoundError, NotADirectoryError):
        write_cache(file, make())
        return file
    except OSError as error:
        raise CorpusError(
            f"cannot read the cache {file}: {error.strerror}; make it readable, or set "
            "XDG_CACHE_HOME to a directory of your own"
        ) from error


def write_cache(file: Path, content: str) -> None:
    """Write a cache file whole, so that a reader never sees half of it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, because several processes may fill the cache at once.
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(content.encode())
        Path(temporary.name).replace(file)
    except OSError as error:
        raise CorpusError(
            f"cannot write {file}: {error}; set XDG_CACHE_HOME to a directory you can write to"
        ) from error


def _documentation() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have invalid escapes
        texts = [text for file in stdlib_sources() for text in _docstrings(file)]
    with suppress(ImportError):
        from pydoc_data.topics import topics

        texts += [topics[name] for name in sorted(topics)]
    return "\n\n".join(texts) + "\n"


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(read_source(file))
    except (SyntaxError, ValueError):
        return
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text
