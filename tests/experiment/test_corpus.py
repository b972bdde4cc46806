import hashlib
import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from thimble_zarr.errors import CorpusError
from thimble_zarr.experiment.corpus import (
    Corpus,
    default_corpus,
    read_corpus,
    read_source,
    stdlib_sources,
    write_cache,
)

SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2

TALKATIVE = '''"""Of the module."""


class Known:
    """Of the class.

    Its second paragraph, indented.
    """

    def method(self):
        """Of the method: naïve 数字 \\d."""
        return "no docstring"

    async def coroutine(self):
        """Of the coroutine."""


def silent():
    x = """no docstring either"""
'''

PADDING = "# a comment, which is source and no documentation\n" * 25_000


def text_of(corpus: Corpus) -> str:
    return "".join(corpus.chunks())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of our own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """A standard library of which we know every docstring."""
    root = tmp_path / "lib"
    files = {
        "talkative.py": TALKATIVE.encode(),
        "padding.py": PADDING.encode(),
        "package/__init__.py": b'"""Of the package."""',
        "package/deep/inner.py": b'"""Of the inner module."""',
        "package/old.py": b'"""Of the old module: \xe9."""',
        "package/broken.py": b'"""Of the broken module."""\ndef (',
        "package/null.py": b'"""Of the module with a null byte."""\x00',
        "package/notes.txt": b'"""Of no module."""',
        "test/test_it.py": b'"""Of a test."""',
        "package/tests/test_it.py": b'"""Of a nested test."""',
        "idlelib/idle_test/test_it.py": b'"""Of a test of idle."""',
        "lib2to3/old.py": b'"""Of lib2to3."""',
        "site-packages/other.py": b'"""Of an installed package."""',
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(root)}[name])
    return root


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    text = "Tönt schön.\n\n  数字 🙂\tend"
    file.write_bytes(text.encode())
    corpus = read_corpus(file)
    assert corpus == Corpus(str(file), file)
    assert text_of(corpus) == text
    assert corpus.n_bytes == len(text.encode())


def test_a_file_is_read_in_chunks(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_bytes("schön\r\n".encode() * 50_000)
    chunks = list(read_corpus(file).chunks())
    assert "".join(chunks) == "schön\n" * 50_000
    assert max(map(len, chunks)) < 100_000


def test_line_ends_are_read_as_python_and_the_notebook_read_them(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_bytes(b"one\r\ntwo\rthree\n")
    with open(file, encoding="utf-8") as stream:  # noqa: PTH123  the notebook's own line
        assert text_of(read_corpus(file)) == stream.read() == "one\ntwo\nthree\n"


def test_the_checksum_is_sha256_of_the_utf8_text(tmp_path: Path) -> None:
    file, checksum = tmp_path / "corpus.txt", hashlib.sha256()
    file.write_text("abc")
    assert [*read_corpus(file).chunks(checksum)] == ["abc"]
    assert checksum.hexdigest() == SHA256_OF_ABC
    file.write_bytes("Tönt 🙂\n".encode())
    assert [*read_corpus(file).chunks(checksum)] == ["Tönt 🙂\n"]
    assert checksum.digest() == hashlib.sha256(b"abc" + file.read_bytes()).digest()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00a", b"caf\xe9", b"ok\x80"])
def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "corpus.txt"
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=r"cannot read the corpus .*corpus\.txt.*UTF-8"):
        text_of(read_corpus(file))


def test_a_corpus_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="there is no such file"):
        read_corpus(tmp_path / "nothing.txt")
    with pytest.raises(CorpusError, match="it is a directory; give a text file"):
        read_corpus(tmp_path)


def test_a_corpus_that_goes_away_is_told(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("here")
    corpus = read_corpus(file)
    file.unlink()
    with pytest.raises(CorpusError, match=r"cannot read the corpus .*: No such file"):
        list(corpus.chunks())


@pytest.mark.usefixtures("library")
def test_the_default_corpus_is_the_librarys_documentation_and_nothing_else() -> None:
    text = text_of(read_corpus(None))
    for part in (
        "Of the module.",
        "Of the class.\n\nIts second paragraph, indented.",
        "Of the method: naïve 数字 \\d.",
        "Of the coroutine.",
        "Of the package.",
        "Of the inner module.",
        "Of the old module: \ufffd.",
        topics["while"],
        topics["assert"],
    ):
        assert text.count(part) == 1, part
    for part in (
        "no docstring",
        "a comment",
        "class Known",
        "Of no module",
        "Of a test",
        "Of a nested test",
        "Of lib2to3",
        "Of an installed package",
        "Of the broken module",
        "null byte",
    ):
        assert part not in text, part


@pytest.mark.usefixtures("library")
def test_the_default_corpus_is_the_same_each_time_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = default_corpus()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    again = default_corpus()
    assert (again.name, text_of(again)) == (first.name, text_of(first))
    assert again.file != first.file
    assert "Python" in first.name
    assert "documentation" in first.name


def test_the_default_corpus_is_kept_in_the_cache(library: Path, cache: Path) -> None:
    made = default_corpus()
    (kept,) = (file for file in cache.rglob("*") if file.is_file())
    assert kept == made.file
    assert kept.read_text(encoding="utf-8") == text_of(made)
    text = text_of(made)
    (library / "talkative.py").unlink()
    assert text_of(default_corpus()) == text


def test_sources_are_all_but_the_tests_sorted(library: Path) -> None:
    names = [str(file.relative_to(library)) for file in stdlib_sources()]
    assert names == [
        "package/__init__.py",
        "package/broken.py",
        "package/deep/inner.py",
        "package/null.py",
        "package/old.py",
        "padding.py",
        "talkative.py",
    ]


def test_the_real_library_has_its_sources() -> None:
    files = stdlib_sources()
    assert Path(os.__file__) in files
    parts = {part for file in files for part in file.relative_to(Path(os.__file__).parent).parts}
    assert not parts & {"site-packages", "test", "tests"}
    assert {"json", "argparse.py"} <= parts
    assert '"""OS routines' in read_source(Path(os.__file__))


@pytest.mark.usefixtures("cache")
def test_a_python_without_sources_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "os.py").write_text('"""Too little."""')
    for make in (stdlib_sources, default_corpus):
        with pytest.raises(CorpusError, match="--corpus FILE and --tokenizer FILE"):
            make()


@pytest.mark.usefixtures("library")
def test_a_cache_that_cannot_be_written_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file / "below"))
    with pytest.raises(CorpusError, match="XDG_CACHE_HOME"):
        default_corpus()


@pytest.mark.usefixtures("library")
def test_a_cache_that_cannot_be_read_is_told_what_to_do() -> None:
    file = default_corpus().file
    file.unlink()
    file.mkdir()  # root may read any file, but no directory
    with pytest.raises(CorpusError, match=r"cannot read the cache .*corpus\.txt.*XDG_CACHE_HOME"):
        default_corpus()


def test_a_cache_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "corpus.txt"
    for content in ("first, and longer", "second"):
        write_cache(file, content)
        assert file.read_text() == content
        assert list(file.parent.iterdir()) == [file]


def test_many_may_write_the_same_cache_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    contents = [str(n) * 50_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda n: write_cache(file, contents[n % 8]), range(200)):
            assert file.read_text() in contents
