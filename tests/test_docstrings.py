"""Every public function and class has a docstring, except methods that override a documented one."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
# Triton kernels can be imported only with Triton; `__main__` modules run their command on import.
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in ("dwrl_fast", "bench")
    for path in sorted((ROOT / room).rglob("*.py"))
]


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name, made in vars(module).items():
        if name.startswith("_") or getattr(made, "__module__", "") != module.__name__:
            continue
        if inspect.isclass(made):
            yield name, made
            for part in vars(made):
                if not part.startswith("_") and (
                    callable(getattr(made, part)) or isinstance(vars(made)[part], property)
                ):
                    yield f"{name}.{part}", getattr(made, part)
        elif inspect.isfunction(made):
            yield name, made


def documented(made: object) -> bool:
    doc = (made.__doc__ if inspect.isclass(made) else inspect.getdoc(made)) or ""
    return bool(doc) and not doc.startswith(f"{getattr(made, '__name__', '')}(")  # which a dataclass writes itself


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert [f"{name}.{what}" for what, made in public(module) if not documented(made)] == []
