"""YAML files that users write: loaded safely, and a key given twice is an error."""

import yaml


class Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice; PyYAML keeps the last one without a message."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of a node. Raises ConstructorError, which names the keys given more than once."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(map(str, twice))} given more than once", node.start_mark
            )
        return super().construct_mapping(node, deep)
