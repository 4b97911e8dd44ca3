"""Imports run downwards: a module imports from its own room (folder) and from lower ones."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "laserrec"
ORDER = [
    ("util",), ("config", "presets"), ("data",), ("llm",), ("evaluation",), ("methods",), ("training",), ("retrieval",),
    ("recommender",), ("server", "batch", "report"), ("experiments",), ("cli",),
]
"""Lowest first. Rooms of one line do not import each other; config and presets are modules and may."""
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

ALLOWED: set[tuple[str, str]] = set()
"""(importing module, imported module): where the rule is still broken. Remove lines; add none."""


def imports(source: str) -> set[str]:
    """Modules of laserrec that a source imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("laserrec.") and is_module(name)}


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def upward(module: str, imported: str) -> bool:
    """Whether this import leads to a higher room, or to another one of the same level."""
    own, other = module.split(".")[1], imported.split(".")[1]
    if own == other or {own, other} == {"config", "presets"}:
        return False
    return LEVEL[other] >= LEVEL[own]


def violations() -> set[tuple[str, str]]:
    found = set()
    for file in {*PACKAGE.rglob("*.py")} - {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}:
        module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        found |= {(module, name) for name in imports(file.read_text(encoding="utf-8")) if upward(module, name)}
    return found


def test_every_room_has_its_level():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms and rooms <= LEVEL.keys(), "give a new room its place in ORDER"


def test_imports_run_downwards():
    new = violations() - ALLOWED
    assert not new, "\n".join(f"{module} imports {name}, which is not in a lower room" for module, name in sorted(new))


def test_every_exception_is_still_needed():
    stale = ALLOWED - violations()
    assert not stale, f"no longer needed; remove from ALLOWED: {sorted(stale)}"


@pytest.mark.parametrize(("source", "bad"), [
    ("from laserrec.cli.main import app", True), ("def f():\n    import laserrec.recommender.hub", True),
    ("from laserrec.batch import engine", True), ("from laserrec.util.io import write_json", False),
    ("from laserrec.data import dataset", False), ("import laserrecord", False),
])
def test_an_upward_import_is_noticed(source, bad):
    found = [name for name in imports(source) if upward("laserrec.methods.sasrec", name)]
    assert bool(found) == bad


def test_advice_names_no_flag_outside_the_command_line():
    """Python has no flags, and every room but cli is used from Python too; a whole command may be named, and
    `errors.option` tells both names."""
    flags = re.compile(r"^(?!.*(laserrec|tensorboard|ray start)\b).*(?<![\w-])--[a-z]")
    found = [f"{file.relative_to(PACKAGE)}:{node.lineno}" for file in PACKAGE.rglob("*.py") if file.parent.name != "cli"
             for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "UserError"
             and any(isinstance(part, ast.Constant) and flags.search(str(part.value)) for part in ast.walk(node))]
    assert found == []
