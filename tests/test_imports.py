"""The allowed imports between rooms, read from the syntax tree, and the modules that `import dwrl_fast` loads."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A room is a module or folder of the package. It may import only rooms before it in this list, so nothing imports
# `train`. A folder's __main__ is a command. It is late in the list, and nothing imports it.
ROOMS = (
    *("errors", "log", "lock", "files", "templates", "kernels", "ops"),
    *("ranks", "compute", "data", "dialog", "encode", "sampling", "batching", "models", "objectives"),
    *("options", "methods", "config", "plan", "scoring", "progress", "feed", "evaluation", "training", "embedded"),
    "doctor",
    *("console", "__main__", "evaluate", "compare", "train"),
)

# These rooms may import only what is listed, themselves and the standard library. The kernels do not import `ops`.
# `ops` loads the kernels when it calls them.
NARROW = {
    "kernels": {"torch", "triton"},
    "objectives": {"torch", "dwrl_fast.errors", "dwrl_fast.log", "dwrl_fast.ops"},
}


def room_files() -> list[tuple[str, Path]]:
    package = ROOT / "dwrl_fast"
    paths = sorted(p for p in package.rglob("*.py") if p != package / "__init__.py")
    inside = [
        ("__main__" if p.stem == "__main__" else p.relative_to(package).parts[0].removesuffix(".py"), p) for p in paths
    ]
    return inside + [("kernels", path) for path in sorted((ROOT / "kernels").rglob("*.py"))]


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """The absolute dotted names that the imports of a module of `package` can load, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def violations(room: str, path: Path) -> Iterator[str]:
    folder = path.relative_to(ROOT).parent.parts
    package = folder if folder[0] == "dwrl_fast" else ("dwrl_fast", *folder)
    for name in imported(ast.parse(path.read_text(encoding="utf-8")), package):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0] if top == "dwrl_fast" else ""
        if "__main__" in rest.split("."):
            yield f"{path.relative_to(ROOT)} imports {name}, a command"
        if target == room or top in sys.stdlib_module_names or name == "dwrl_fast.__version__":
            continue
        if top == "dwrl_fast" and (target not in ROOMS or ROOMS.index(target) > ROOMS.index(room)):
            yield f"{path.relative_to(ROOT)} imports {name}, which does not stand before {room}"
        if room in NARROW and (f"dwrl_fast.{target}" if target else top) not in NARROW[room]:
            yield f"{path.relative_to(ROOT)} imports {name}; {room} may import {', '.join(sorted(NARROW[room]))}"


def rooms_on_disk(root: Path) -> set[str]:
    """The rooms in the two folders of the checkout: folders with Python files, and modules."""
    package = root / "dwrl_fast"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    folders = {path.name for path in package.iterdir() if any(path.rglob("*.py"))}
    commands = {"__main__"} if any(package.rglob("__main__.py")) else set()
    return modules | folders | commands | ({"kernels"} if any((root / "kernels").rglob("*.py")) else set())


def test_the_rooms_are_those_of_the_folders() -> None:
    found = rooms_on_disk(ROOT)
    assert len(ROOMS) == len(set(ROOMS)), "one place each"
    assert found - set(ROOMS) == set(), "give it a place in ROOMS: after all that it imports, before all that import it"
    assert set(ROOMS) - found == set(), "there is no such room: take it out of ROOMS"
    assert {room for room, _ in room_files()} == found, "a room whose files are not read is not held to the rule"


def test_a_narrow_room_is_a_room() -> None:
    named = {*NARROW, *(name.partition(".")[2] for some in NARROW.values() for name in some if "dwrl_fast." in name)}
    assert named <= rooms_on_disk(ROOT)


def test_rooms_on_disk_are_modules_and_folders_with_modules(tmp_path: Path) -> None:
    for name in ("dwrl_fast/__init__.py", "dwrl_fast/one.py", "dwrl_fast/two/deep/x.py", "kernels/k.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dwrl_fast" / "__pycache__").mkdir()
    assert rooms_on_disk(tmp_path) == {"one", "two", "kernels"}
    (tmp_path / "dwrl_fast" / "two" / "__main__.py").touch()
    assert rooms_on_disk(tmp_path) == {"one", "two", "kernels", "__main__"}


def test_the_picture_of_the_rooms_shows_each_of_them() -> None:
    """docs/architecture.md has a picture of the rooms, and names the modules that the picture leaves out."""
    _, picture, rest = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```", 2)
    beside = rest.partition("The picture leaves out")[2].partition("\n\n")[0]
    shown = re.findall(r"\b([a-z_]+)(?:/|\.py)", picture) + re.findall(r"`([a-z_]+)(?:/|\.py)`", beside)
    assert set(shown) - {"csrc"} == rooms_on_disk(ROOT) - {"__main__"}


def test_imports_go_one_way() -> None:
    assert [line for room, path in room_files() for line in violations(room, path)] == []


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("data", "from dwrl_fast.dialog import Dialog", 1),
        ("data", "def late():\n    import dwrl_fast.dialog", 1),
        ("data", "from .. import dialog", 1),
        ("data", "from . import jsonl\nfrom .jsonl import read\nfrom ..errors import DataError\nimport numpy", 0),
        ("evaluate", "from dwrl_fast import train", 1),
        ("train", "from dwrl_fast.dialog.__main__ import main", 1),
        ("__main__", "from dwrl_fast import console, dialog, models", 0),
        ("objectives", "from dwrl_fast import ops, models", 1),
        ("kernels", "import triton.language as tl\nimport torch", 0),
        ("kernels", "import transformers", 1),
        ("kernels", "from dwrl_fast.ops import oracle", 2),
    ],
)
def test_the_rule_itself(
    room: str, source: str, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / ("kernels/x.py" if room == "kernels" else f"dwrl_fast/{room}/x.py")
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert len(list(violations(room, path))) == expected


def test_the_oracle_is_plain_pytorch() -> None:
    tree = ast.parse((ROOT / "dwrl_fast" / "ops" / "oracle.py").read_text(encoding="utf-8"))
    tops = {name.partition(".")[0] for name in imported(tree, ("dwrl_fast", "ops"))}
    assert tops <= {"torch", *sys.stdlib_module_names}


def test_importing_the_package_stays_light() -> None:
    script = "import sys, dwrl_fast; dwrl_fast.ops; print([m for m in ('transformers', 'vllm') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"


def test_the_documented_way_of_a_pair_is_short_and_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    way = text.partition("## The path of one pair")[2].partition("\n## ")[0]
    files = set(re.findall(r"`(dwrl_fast/[\w/]+\.py)`", way))
    assert 10 < len(files) <= 20 and all((ROOT / file).is_file() for file in files)
    assert sum(path.is_file() for path in (ROOT / "dwrl_fast").glob("*.py")) <= 12
