"""Formulas as MathML, which browsers show by themselves: a hook of MkDocs turns each one's LaTeX into it."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """The page's HTML with MathML in place of LaTeX. ValueError where a formula has a command that is not known."""

    def formula(found: re.Match[str]) -> str:
        latex = html.unescape(found[2])
        made: str = convert(latex, display="block" if found[1] == "div" else "inline")
        if "\\" in made:  # a command that the converter does not know comes out as it is
            raise ValueError(f"{page.file.src_uri}: this formula cannot be shown: {latex}")
        return made.replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.17em"/>')  # as TeX sets it

    return FORMULA.sub(formula, content)
