"""The registry of methods, and the example method of the documentation."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dwrl_fast.config import TrainConfig
from dwrl_fast.methods import METHODS
from dwrl_fast.options import Options, help_page, option_fields
from dwrl_fast.scoring import VERDICTS

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "methods.md").read_text()
# A script that uses the new method, in a checkout that has it.
TRIED = """
import sys
from pathlib import Path
from fakes import FakePolicy
from judging import A, PAIRWISE
from tiny import tiny_config, tiny_folder, tiny_rows
from dwrl_fast.config import TrainConfig, parse_train
from dwrl_fast.dialog import SingleTurn
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.options import help_page
from dwrl_fast.training.dry_run import guessed_groups

folder = Path(sys.argv[1])
tiny_folder(folder / "tiny")
assert "--kept_thoughts N >= 1 [1] (with method star-short)" in help_page(TrainConfig, 10_000)
files = ["--model_name_or_path", "m", "--dataset_name", "d"]
assert parse_train([*files, "--kept_thoughts", "2"]).without_effect() == {"kept_thoughts": "method=star-short"}
rows, config = tiny_rows(folder), tiny_config(folder, method="star-short", kept_thoughts=2)
policy = FakePolicy(config, SingleTurn(make_tokenizer(), PAIRWISE, "correctness"), lambda text, i: i * "1 " + A)
groups, figures = policy.rollout(rows)
assert groups and {len(some) for group in groups for some in group.thoughts} == {2}
assert all(len(some[0].ids) < len(some[1].ids) for group in groups for some in group.thoughts)
loss, gradients, _ = policy.step(groups)
assert loss > 0 and any(g.abs().max() > 0 for g in gradients.values())
assert len(guessed_groups(rows, policy.method, 4)) == len(rows)
"""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_documented_and_has_a_verdict(name: str) -> None:
    assert f"`{name}`" in DOCS and f"{name}: " in help_page(TrainConfig, 10_000)
    assert METHODS[name].verdict in VERDICTS


def test_the_methods_are_those_of_the_papers() -> None:
    assert set(METHODS) == {
        *("bt", "gram", "grpo-pair", "grpo-point", "genrm", "star-sft", "star-dpo", "star-rationalizer", "pairrm"),
        *("judge", "sft", "dpo", "dwrl", "btpo"),
    }


def test_the_method_of_the_documentation_is_a_file_and_a_line(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?class ShortImitation.*?)```", DOCS, re.S)
    (line,) = re.findall(r'```text\n( +"star_short:ShortImitation",\n)```', DOCS)
    methods = Path(shutil.copytree(ROOT / "dwrl_fast", tmp_path / "dwrl_fast")) / "methods"
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    (methods / "star_short.py").write_text(source)
    registry = methods / "registry.py"
    registry.write_text(registry.read_text().replace("WHERE = (\n", f"WHERE = (\n{line}"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests")])}
    command = [sys.executable, "-c", TRIED, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_option_is_declared_once() -> None:
    """If two options had the same name, the dataclass would silently keep one."""
    classes = [each for each in TrainConfig.__mro__ if issubclass(each, Options)]
    names = [f for each in classes for f in vars(each).get("__annotations__", {})]
    shadowed = {name for name in names if names.count(name) > 1} - {"command", "summary", "groups", "examples"}
    assert shadowed == set() and {f.name for f in option_fields(TrainConfig)} <= set(names)


def test_no_other_room_compares_the_names_of_methods() -> None:
    """Other rooms look up a method's traits in METHODS."""
    names = "|".join(map(re.escape, METHODS))
    compared = re.compile(rf"""(?:==|!=|\bin\b)\s*[(\[{{]?\s*["'](?:{names})["']""")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "dwrl_fast").rglob("*.py"))
        if "methods" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if compared.search(line)
    ]
    assert found == []
