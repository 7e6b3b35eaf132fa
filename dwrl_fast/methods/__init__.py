"""The methods behind `--method`. A method is one file with its questions, its reward, its loss, its options, and the
traits that other packages read. No method holds a model. registry.py lists the methods.
"""

from importlib import import_module

from dwrl_fast.methods.method import Method
from dwrl_fast.methods.metrics import StepMetrics
from dwrl_fast.methods.registry import WHERE


def _load(where: str) -> type[Method]:
    module, _, name = where.partition(":")
    found: type[Method] = getattr(import_module(f"dwrl_fast.methods.{module}"), name)
    return found


METHODS: dict[str, type[Method]] = {method.name: method for method in map(_load, WHERE)}

__all__ = ["METHODS", "Method", "StepMetrics"]
