"""Text to train on: any file, or the default that every Python carries.

The default corpus is made of the standard library's documentation: every docstring of its modules
and the topics of `pydoc`. The default tokenizer is trained on the sources of the same modules, code
included, so that a part of its vocabulary never occurs in the corpus: dead tokens, as in the
original experiment. Sources differ between Python versions; the recorded sha256 tells which.
"""

import ast
import hashlib
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from thimble_zarr.errors import CorpusError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"}
_LEAST_SOURCE_BYTES = 2**20


@dataclass(frozen=True)
class Corpus:
    """A text and where it is from.

    Attributes
    ----------
    name
        A file's path, or what the default is called.
    text
        All of it.
    """

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Checksum of the text in UTF-8, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_corpus(file: Path | None) -> Corpus:
    """Return the text of a file, or the default corpus.

    Raises
    ------
    CorpusError
        If the file is not readable UTF-8 text, or the standard library has no sources.
    """
    if file is None:
        return default_corpus()
    try:
        return Corpus(str(file), file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(
            f"cannot read the corpus {file}: {error}; it must be UTF-8 text"
        ) from error


def default_corpus() -> Corpus:
    """Return the documentation in the standard library; kept in the user's cache."""
    cached = cache_file("corpus.txt")
    if not cached.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources have invalid escapes
            texts = [text for file in stdlib_sources() for text in _docstrings(file)]
        write_cache(cached, "\n\n".join([*texts, *_topics()]) + "\n")
    return Corpus(_default_name("documentation"), cached.read_text(encoding="utf-8"))


def stdlib_sources() -> list[Path]:
    """Return the standard library's source files but for its tests, sorted.

    Raises
    ------
    CorpusError
        If this Python comes without them.
    """
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


def cache_file(name: str) -> Path:
    """Return where a derived default lies in the user's cache, for this Python."""
    version = f"python-{platform.python_version()}"
    return Path(platformdirs.user_cache_dir("thimble-zarr")) / version / name


def write_cache(file: Path, content: str) -> None:
    """Write a cache file whole, so that a reader never sees half of it.

    Raises
    ------
    CorpusError
        If the cache cannot be written.
    """
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


def _default_name(part: str) -> str:
    return f"{part} of the Python {platform.python_version()} standard library"


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(read_source(file))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics)]
