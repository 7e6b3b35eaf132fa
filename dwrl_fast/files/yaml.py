"""Loads YAML safely and with limits. A duplicate key is an error."""

from collections import Counter
from typing import Any

import yaml

MOST = 1 << 20  # characters
VALUES = 100_000  # limit of values in a file; every use of an alias counts again


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys, of which PyYAML would silently keep the last one, and merge keys (<<),
    which multiply the keys of nested mappings before they can be counted.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Checks the keys, then as in the base class."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read", node.start_mark)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(map(str, twice))} given more than once", node.start_mark
            )
        return super().construct_mapping(node, deep)


def bounded_yaml(text: str, name: str) -> Any:
    """The value of `text`, the content of the file `name`. Raises yaml.YAMLError for every kind of error."""
    if len(text) > MOST:
        raise yaml.YAMLError(f"larger than {MOST >> 20} MiB, the limit for options and templates")
    try:
        loader = _Loader(text)
        loader.name = name
        values = loader.get_single_data()
    except (RecursionError, ValueError, TypeError) as error:  # dates, numbers and keys that Python cannot represent
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
