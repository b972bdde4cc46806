"""The picture of the house, held against the imports."""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

import thimble_zarr
from tests.support.rooms import MAY_IMPORT, OPENERS
from thimble_zarr.optim.registry import SPECS

ROOT = Path(thimble_zarr.__file__).parent

HEAVY = (
    "torch",
    "transformers",
    "matplotlib",
    "bokeh",
    "xarray",
    "dask",
    "zarr",
    "pandas",
    "numpy",
    "distributed",
)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in ROOT.rglob("*.py")}


@cache
def imported_modules(file: Path) -> frozenset[str]:
    """Return every module of the package that `file` imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found & MODULES - {"thimble_zarr"})


FILES = sorted(file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py")


def room(name: str) -> str:
    return name.split(".")[1]


def forbidden(name: str, imported: Iterable[str]) -> set[str]:
    """Return the rooms from which a module imports and may not."""
    here = room(name)
    others = {room(other) for other in imported} - {here}
    return others - MAY_IMPORT[here] - OPENERS.get(name.partition(".")[2], set())


def test_a_room_imports_only_what_the_picture_allows() -> None:
    imported = {module_name(file): imported_modules(file) for file in FILES}
    found = {name: forbidden(name, others) for name, others in imported.items()}
    assert {name: rooms for name, rooms in found.items() if rooms} == {}


MAX_LINES, MAX_CODE_LINES, MAX_MODULES = 450, 40, 12
MAX_LINES_OF_A_SPEC = 200


def code_lines(file: Path) -> dict[str, int]:
    """Return the lines of code of each function: without docstring, comments and blank lines."""
    text = file.read_text()
    coded = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            doc = range(0)
            if ast.get_docstring(node) is not None:
                doc = range(first.lineno, first.end_lineno + 1)
            lines = range(node.lineno, node.end_lineno + 1)
            found[node.name] = len((coded & {*lines}) - {*doc})
    return found


_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    tokenize.ENDMARKER,
}


def too_large(file: Path, *, most: int = MAX_LINES) -> dict[str, int]:
    """Return how many lines a file has, and each function in it, of which they are too many."""
    found = {name: n for name, n in code_lines(file).items() if n > MAX_CODE_LINES}
    n_lines = len(file.read_text().splitlines())
    return found | ({"lines": n_lines} if n_lines > most else {})


def test_modules_and_functions_are_small() -> None:
    found = {module_name(file): too_large(file) for file in FILES}
    assert {name: large for name, large in found.items() if large} == {}


def test_an_optimizer_is_one_small_file() -> None:
    folders = (ROOT / "optim" / name for name in ("specs", "third_party"))
    files = [file for folder in folders for file in folder.glob("*.py")]
    found = {file.name: too_large(file, most=MAX_LINES_OF_A_SPEC) for file in files}
    assert {name: large for name, large in found.items() if large} == {}
    modules = [spec.__module__ for spec in SPECS]
    assert {*modules} <= {module_name(file) for file in files}
    assert len({*modules}) == len(modules)


def test_what_is_too_large_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    for n, expected in ((0, {}), (1, {"f": MAX_CODE_LINES + 1, "lines": MAX_LINES + 1})):
        lines = ["def f():", '    """Doc."""', *["    x = 1"] * (MAX_CODE_LINES - 1 + n)]
        lines += ["# why"] * (MAX_LINES - MAX_CODE_LINES - 1)
        file.write_text("\n".join(lines))
        assert too_large(file) == expected


def test_folders_are_small() -> None:
    folders = [folder for folder in ROOT.rglob("*") if folder.is_dir()]
    n_modules = {
        module_name(folder): len([f for f in folder.glob("*.py") if f.name != "__init__.py"])
        for folder in folders
    }
    assert {name: n for name, n in n_modules.items() if n > MAX_MODULES} == {}


def test_no_test_serves_another_as_a_library() -> None:
    for file in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert ".test_" not in f".{node.module}", f"{file}: {node.module}"


def test_every_room_is_in_the_picture() -> None:
    assert {room(module_name(file)) for file in FILES} <= set(MAY_IMPORT)


def test_there_are_no_cycles() -> None:
    graph = {module_name(file): imported_modules(file) for file in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_checks_see_a_forbidden_import(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from thimble_zarr.record import recorder\n")
    imported = imported_modules(file)
    assert imported == {"thimble_zarr.record", "thimble_zarr.record.recorder"}
    assert forbidden("thimble_zarr.analysis.health", imported) == {"record"}
    assert forbidden("thimble_zarr.experiment.trainer", imported) == set()


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(shown.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import thimble_zarr; dir(thimble_zarr)",
        "from click.testing import CliRunner; from thimble_zarr.cli.main import cli; "
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0",
        "from click.testing import CliRunner; from thimble_zarr.cli.main import cli; "
        "assert CliRunner().invoke(cli, ['train', '--help']).exit_code == 0",
    ],
)
def test_starting_is_cheap(code: str) -> None:
    assert not modules_after(code) & set(HEAVY)


def test_reading_needs_no_torch() -> None:
    assert not modules_after("import thimble_zarr; thimble_zarr.open_dataset") & {
        "torch",
        "transformers",
    }


def test_processes_can_be_forked_before_what_only_a_report_needs() -> None:
    names = ("selection", "audit.audit", "compute.memory")
    code = "\n".join(f"import thimble_zarr.analysis.{name}" for name in names)
    assert not modules_after(code) & {"torch", "xarray", "dask", "pandas", "zarr", "distributed"}


def test_recording_needs_no_transformers_and_no_analysis() -> None:
    loaded = modules_after("import thimble_zarr; thimble_zarr.Recorder")
    assert "transformers" not in loaded
    assert not {name for name in loaded if name.startswith("thimble_zarr.analysis")}


def test_public_names_exist() -> None:
    for name in thimble_zarr.__all__:
        assert getattr(thimble_zarr, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        thimble_zarr.nothing  # noqa: B018
