"""The rooms of the library, and which of them may import which: `trainers -> training -> {losses, data} -> networks ->
tensors`, and nothing but themselves imports the leaves."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nnunetv2_selfreg"
GROUND = ("errors", "files", "discovery")  # files of their own that any room may use
ALLOWED = {
    "tensors": set(),
    "networks": {"tensors"},
    "losses": {"networks", "tensors"},
    "data": {"networks", "tensors"},
    "training": {"losses", "data", "networks", "tensors"},
    "trainers": {"training"},
    "analysis": {"training", "losses", "data", "networks", "tensors"},
    "labeling": {"analysis", "data", "networks", "tensors"},
    "benchmark": {"analysis", "data", "networks", "tensors"},
    "cli": {"benchmark", "labeling", "analysis", "training", "data", "networks", "tensors"},
}
ALONE = {"tensors": {"torch"}, "losses": {"torch"}}
"""Rooms that use these packages only, besides the standard library and their own project."""
WITHOUT_NNUNET = ("tensors", "networks", "losses")


def files_of(room: str) -> list[Path]:
    if room == "trainers":
        return sorted((ROOT / room).glob("*.py"))
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported(file: Path) -> Iterator[str]:
    """Names of all modules that a file imports anywhere, also for type checkers and within functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            # `from package import module` or `from module import name`: the longer name decides about the room.
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room_of(module: str) -> str | None:
    """The room of an imported name of the library; None for the package itself and for others."""
    parts = module.split(".")
    is_ours = parts[0] == PACKAGE.name and len(parts) > 1
    return parts[1] if is_ours and (parts[1] in ALLOWED or parts[1] in GROUND) else None


def test_every_file_is_in_a_room():
    known = {*ALLOWED, *GROUND, "__init__"}
    assert {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    } <= known
    assert all(files_of(room) for room in ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_one_way(room):
    for file in files_of(room):
        rooms = {room_of(module) for module in imported(file)} - {None, room, *GROUND}
        assert rooms <= ALLOWED[room], f"{file} imports {rooms - ALLOWED[room]}"


@pytest.mark.parametrize("module", GROUND)
def test_what_all_rooms_use_imports_none_of_them(module):
    assert {room_of(name) for name in imported(PACKAGE / f"{module}.py")} <= {None, *GROUND}


def test_no_import_runs_both_ways():
    arrows = {(room, room_of(name)) for room in ALLOWED for file in files_of(room) for name in imported(file)}
    assert not {(a, b) for a, b in arrows if a != b and (b, a) in arrows}


@pytest.mark.parametrize(("room", "packages"), ALONE.items())
def test_rooms_that_need_torch_only(room, packages):
    for file in files_of(room):
        others = {name.split(".")[0] for name in imported(file)} - sys.stdlib_module_names - {PACKAGE.name}
        assert others <= packages, f"{file} imports {others - packages}"


@pytest.mark.parametrize("room", WITHOUT_NNUNET)
def test_rooms_below_the_trainers_know_nothing_of_nnunet(room):
    for file in files_of(room):
        assert not any(name.split(".")[0] == "nnunetv2" for name in imported(file)), file
