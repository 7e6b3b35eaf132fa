"""YAML: loaded safely, within bounds, and a key given twice is an error."""

from typing import Any

import yaml

MOST = 1 << 20  # characters
VALUES = 100_000  # that a file may hold, where it names one of them again counted anew


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice; PyYAML keeps the last one without a message."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(map(str, twice))} given more than once", node.start_mark
            )
        return super().construct_mapping(node, deep)


def bounded_yaml(text: str, name: str) -> Any:
    """What the text of the file `name` holds. Raises yaml.YAMLError for whatever is wrong with it."""
    if len(text) > MOST:
        raise yaml.YAMLError(f"larger than {MOST >> 20} MiB, the limit for options and templates")
    try:
        loader = _Loader(text)
        loader.name = name
        values = loader.get_single_data()
    except (RecursionError, ValueError, TypeError) as error:  # of dates, numbers and keys that Python has none of
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise yaml.YAMLError(what) from None
    left, waiting = VALUES, [values]
    while waiting:
        value = waiting.pop()
        left -= 1
        if left < 0:
            raise yaml.YAMLError(f"its anchors expand to more than {VALUES:,} values")
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
    return values
