"""Only `optim/` and the readers of other people's files know an optimizer's states and numbers."""

import ast
import re
from pathlib import Path

import thimble_zarr
from thimble_zarr.optim.base import LEARNING_RATE, WEIGHT_DECAY
from thimble_zarr.optim.registry import SPECS

ROOT = Path(thimble_zarr.__file__).parent

ORDINARY = {"sum", "variance", "prev", "ax", "step_size", "alpha", "mu", "eta", "z", "k", "r"}
"""States and numbers of which the name is a word that means other things elsewhere."""

STATES = {state.name for spec in SPECS for state in spec.STATES} - ORDINARY
SCALARS = {of.name for spec in SPECS for of in spec.SCALARS} - {
    LEARNING_RATE.name,
    WEIGHT_DECAY.name,
    *ORDINARY,
}
FLAGS = {"amsgrad", "decoupled_weight_decay", "nesterov", "betas", "betas_dtype"}
ALIASES = {alias for spec in SPECS for alias in spec.ALIASES}
ESTIMATES = {estimate.name for spec in SPECS for estimate in spec.ESTIMATES}
WORDS = STATES | SCALARS | FLAGS | ALIASES | ESTIMATES

DEMO = {"experiment": WORDS, "cli/train.py": {"adam_residual"}}
"""The demo is a training script: it makes an AdamW, with settings of its own."""

FILES = sorted(
    file
    for file in ROOT.rglob("*.py")
    if file.relative_to(ROOT).parts[0] not in ("optim", "sources")
)


def names(file: Path) -> set[str]:
    """Return the words of a file's code: names, attributes, keywords, texts, but no docstring."""
    tree, documents = ast.parse(file.read_text()), set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                documents.add(statement.value)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword | ast.arg):
            found.add(node.arg or "")
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {*re.findall(r"\w+", node.value)} if node not in documents else set()
    return found


def known(file: Path) -> set[str]:
    return WORDS & names(file)


def test_no_other_room_knows_a_state_or_number_by_name() -> None:
    found = {file.relative_to(ROOT).as_posix(): known(file) for file in FILES}
    for place in found:
        found[place] -= set().union(*(DEMO[demo] for demo in DEMO if place.startswith(demo)))
    assert {place: words for place, words in found.items() if words} == {}


def test_the_check_sees_them_wherever_they_are(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text('"""exp_avg"""\nx.exp_avg_sq\nf(beta1=2)\ny = "ds.adam_update + 1"\n')
    assert known(file) == {"exp_avg_sq", "beta1", "adam_update"}
    file.write_text('def f():\n    """Of exp_avg."""\n\n\nX = 1\n"""beta2"""\n')
    assert known(file) == set()
