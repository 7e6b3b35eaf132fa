"""What the commands of this folder share: a help text that names the command and says what it measures."""

import argparse


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m bench.<name>`. about: its module's docstring, shown as it is laid out."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
