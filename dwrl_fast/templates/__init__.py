"""The turns that ask a model to judge, as data: one YAML file per template."""

from dwrl_fast.templates.template import (
    DEFAULT,
    KINDS,
    PLACE,
    Template,
    fill,
    load_template,
    read_template,
    template_names,
)

__all__ = ["DEFAULT", "KINDS", "PLACE", "Template", "fill", "load_template", "read_template", "template_names"]
