"""Parses verdicts in generated text. Pure functions: the last verdict in the text counts; None means no verdict."""

import re

CHOICE = re.compile(r"<answer>\s*\[\[([AB])\]\]\s*</answer>")
SCORE = re.compile(r"<s>\s*(-?\d{1,9}(?:\.\d{1,9})?)\s*</s>")
LOWEST, HIGHEST = 0.0, 10.0


def read_choice(text: str) -> int | None:
    """0 for `<answer>[[A]]</answer>`, 1 for `<answer>[[B]]</answer>`."""
    found = CHOICE.findall(text)
    return "AB".index(found[-1]) if found else None


def write_choice(letter: str) -> str:
    """The verdict for "A" or "B" as `read_choice` reads it."""
    return f"<answer>[[{letter}]]</answer>"


def write_score(number: str) -> str:
    """The verdict of a number as `read_score` reads it."""
    return f"<s>{number}</s>"


def read_score(text: str) -> float | None:
    """The number in `<s>7</s>`, from 0 to 10; a number outside this range is not a verdict."""
    found = SCORE.findall(text)
    return float(found[-1]) if found and LOWEST <= float(found[-1]) <= HIGHEST else None
