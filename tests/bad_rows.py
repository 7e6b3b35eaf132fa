"""Malformed input for tests. Each case is a line between two good ones, or a whole file, with the expected outcome."""

import gzip
import json
import lzma
from dataclasses import dataclass, field
from typing import Any

ASK = {"role": "user", "content": "Why?"}
YES = {"role": "assistant", "content": "Because."}
NO = {"role": "assistant", "content": "No."}
MORE = {"role": "user", "content": "And?"}
SYSTEM = {"role": "system", "content": "Be brief."}

PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
MAGNITUDE = PAIR | {"magnitude": 2}
RANKS = {"prompt": "Why?", "responses": ["Because.", "No.", "Hm."], "ranks": [1, 2, 3]}
SCORES = {"prompt": "Why?", "responses": ["Because.", "No.", "Hm."], "scores": [9.0, 2, -1]}
COMPLETIONS = {
    "context": "Why?",
    "completions": [{"rank": 0, "completion": "Because."}, {"rank": 1, "completion": "No."}],
}
SINGLE = {"prompt": "Why?", "completion": "Because.", "score": 4}
SINGLES = [SINGLE, SINGLE | {"completion": "No.", "score": 1}]  # neither would be used alone

NAN, INF = float("nan"), float("inf")
SPACES = "So" + " " * 113_000 + "what."


@dataclass(frozen=True)
class Bad:
    """A line and what it is put between, with the one thing that becomes of it.

    error: matches the message behind "FILE:LINE: ", remedy included. dropped: the reason it is counted under.
    used: the first of the responses read from it.
    """

    line: Any  # bytes: as they stand
    among: list[dict[str, Any]] = field(default_factory=lambda: [PAIR])
    error: str = ""
    dropped: str = ""
    used: str = ""

    @property
    def content(self) -> bytes:
        raw = self.line if isinstance(self.line, bytes) else json.dumps(self.line).encode()
        good = [json.dumps(row).encode() for row in self.among]
        return b"\n".join([*good, raw, *good]) + b"\n"

    @property
    def number(self) -> int:
        return len(self.among) + 1


def text(line: str, encoding: str = "utf-8") -> bytes:
    return line.encode(encoding)


GOOD_LINE = json.dumps(PAIR)
NOT_JSON = r"not JSON \(.* at character \d+\); each line must be one object"
NOT_UTF8 = r"not UTF-8 \(.* at byte \d+\); convert the file to UTF-8"
NO_OBJECT = "a .* where an object was expected; each line must be one object"
UNREADABLE = r"JSON that cannot be read \(.*\); remove the line"
TWICE = "the key '.*' occurs twice in one object; remove one of the two"
NO_ORDER = (
    "the ranks are not an order (they start at the best response, and tied responses share a rank: 1 2 2 3 or 1 2 2 4)"
)
SURROGATE = "a lone surrogate, which is not valid text"

ENCODING = {
    "cut off": Bad(text('{"prompt": "Why?", '), error=NOT_JSON),
    "cut off inside a string": Bad(text(GOOD_LINE[:30]), error=NOT_JSON),
    "trailing comma": Bad(text(GOOD_LINE[:-1] + ",}"), error=NOT_JSON),
    "single quotes": Bad(text(repr(PAIR)), error=NOT_JSON),
    "unquoted keys": Bad(text('{prompt: "Why?"}'), error=NOT_JSON),
    "comment": Bad(b"// three more", error=NOT_JSON),
    "CSV": Bad(b"Why?,Because.,No.", error=NOT_JSON),
    "two objects": Bad(text(GOOD_LINE + GOOD_LINE), error=NOT_JSON),
    "two objects behind a carriage return": Bad(text(GOOD_LINE + "\r" + GOOD_LINE), error=NOT_JSON),
    "opening bracket of an array": Bad(b"[", error=NOT_JSON),
    "raw newline in a string": Bad(text(GOOD_LINE.replace("No.", "N\no.")), error=NOT_JSON),
    "raw tab in a string": Bad(text(GOOD_LINE.replace("No.", "N\to.")), error=NOT_JSON),
    "raw NUL in a string": Bad(text(GOOD_LINE.replace("No.", "N\0o.")), error=NOT_JSON),
    "raw escape in a string": Bad(text(GOOD_LINE.replace("No.", "\x1b[31mNo.")), error=NOT_JSON),
    "NULs": Bad(bytes(100), error=NOT_JSON),
    "bad escape": Bad(text(GOOD_LINE.replace("No.", r"\xNo.")), error=NOT_JSON),
    "array": Bad([PAIR], error=NO_OBJECT),
    "string": Bad("Why?", error=NO_OBJECT),
    "number": Bad(5, error=NO_OBJECT),
    "null": Bad(None, error=NO_OBJECT),
    "NaN": Bad(NAN, error=NO_OBJECT),
    "deep nesting": Bad(b"[" * 100_000, error=UNREADABLE),
    "deep objects": Bad(b'{"a":' * 100_000, error=UNREADABLE),
    "nesting that can be read": Bad(
        text('{"prompt": "p", "chosen": ' + "[" * 500 + "]" * 500 + ', "rejected": "b"}'), error="'chosen' should hold"
    ),
    "number without end": Bad(text('{"margin": ' + "9" * 5000 + "}"), error=UNREADABLE),
    "duplicate key": Bad(text(GOOD_LINE[:-1] + ', "chosen": "Why not."}'), error=TWICE),
    "duplicate key in a message": Bad(
        text(json.dumps(PAIR | {"chosen": [YES]}).replace('"role"', '"content": "No.", "role"')), error=TWICE
    ),
    "Latin-1": Bad(text(GOOD_LINE.replace("No.", "Öl"), "latin-1"), error=NOT_UTF8),
    "smart quotes of cp1252": Bad(text(GOOD_LINE.replace("No.", "“No.”"), "cp1252"), error=NOT_UTF8),
    "UTF-16": Bad(text(GOOD_LINE, "utf-16"), error=NOT_UTF8),
    "UTF-16 without BOM": Bad(text(GOOD_LINE, "utf-16-le"), error=NOT_JSON),
    "UTF-32": Bad(text(GOOD_LINE, "utf-32"), error=NOT_UTF8),
    "surrogates in UTF-8": Bad(text(GOOD_LINE).replace(b"No.", b"\xed\xa0\x80"), error=NOT_UTF8),
    "overlong UTF-8": Bad(text(GOOD_LINE).replace(b"No.", b"\xc0\xaf"), error=NOT_UTF8),
    "half a character": Bad(text(GOOD_LINE[:-2]) + b"\xe2\x82", error=NOT_UTF8),
    "binary": Bad(b"\x89PNG\r\x1a\x00\x00\x00\rIHDR\xff\xfe", error=NOT_UTF8),
}

STRANGE = {
    "BOM": Bad(b"\xef\xbb\xbf" + text(GOOD_LINE), used="Because."),
    "CRLF": Bad(text(GOOD_LINE + "\r"), used="Because."),
    "blanks around": Bad(text(" \t" + GOOD_LINE + "  "), used="Because."),
    "line separators": Bad(
        text(json.dumps(PAIR | {"chosen": "a\u2028b\u2029c\u0085d"}, ensure_ascii=False)), used="a\u2028b\u2029c\u0085d"
    ),
    "escaped NUL": Bad(PAIR | {"chosen": "a\0b"}, used="a\0b"),
    "escaped control characters": Bad(PAIR | {"chosen": "a\x07\x1b[31mb\x7f"}, used="a\x07\x1b[31mb\x7f"),
    "replacement character": Bad(PAIR | {"chosen": "a\ufffdb"}, used="a\ufffdb"),
    "pair of escaped surrogates": Bad(text(GOOD_LINE.replace("Because.", r"\ud83d\ude00")), used="\U0001f600"),
    "control token": Bad(PAIR | {"chosen": "a</s><|im_end|>"}, used="a</s><|im_end|>"),
    "newlines around": Bad(PAIR | {"chosen": "\n\na\n"}, used="\n\na\n"),
    "113,000 spaces": Bad(PAIR | {"chosen": SPACES}, used=SPACES),
    "further columns": Bad(PAIR | {"id": 7, "meta": {"a": [None]}}, used="Because."),
    "escaped keys": Bad(text(GOOD_LINE.replace("prompt", r"\u0070rompt")), used="Because."),
    "null aspect": Bad(PAIR | {"aspect": None}, used="Because."),
    "blank aspect": Bad(PAIR | {"aspect": " "}, used="Because."),
    "tool calls that are none": Bad(PAIR | {"chosen": [YES | {"tool_calls": []}]}, used="Because."),
    "prompt that is in the responses too": Bad(PAIR | {"chosen": [ASK, YES], "rejected": [ASK, NO]}, used="Because."),
    "ties in a ranking": Bad(RANKS | {"ranks": [1, 1, 3]}, [RANKS], used="Because."),
    "whole numbers with a point": Bad(RANKS | {"ranks": [1.0, 2.0, 3.0]}, [RANKS], used="Because."),
    "ranks beside null scores": Bad(RANKS | {"scores": None}, [RANKS], used="Because."),
}

COLUMNS = {
    "no columns": Bad({}, error="no column 'chosen' among none; name it with --columns chosen=NAME"),
    "misspelt column": Bad(
        {"prompt": "p", "choosen": "a", "rejected": "b"},
        error=r"no column 'chosen' among .*; .* --columns chosen=choosen",
    ),
    "column in capitals": Bad({"prompt": "p", "Chosen": "a", "rejected": "b"}, error="no column .* chosen=Chosen"),
    "columns that cannot be typed": Bad({"chosen\ud800": "a", "b\n": "b"}, error=r"no column .*ud800.* chosen=NAME"),
    "ten thousand columns": Bad({f"column {i}": i for i in range(10_000)}, error="no column 'chosen' .* chosen=NAME"),
    "no prompt": Bad({"chosen": "a", "rejected": "b"}, error="no column 'prompt' among .*; .* --columns prompt=NAME"),
    "another format": Bad(RANKS, error="the columns of a RANKING row, but .* BINARY; put the two in separate files"),
    "no magnitude": Bad(
        PAIR, [MAGNITUDE], error="the columns of a BINARY row, but the rows before it are BINARYMAGN; put"
    ),
    "no ranks": Bad(
        {"prompt": "p", "responses": ["a"]}, [RANKS], error="no column 'ranks' .*; .* --columns ranks=NAME"
    ),
    "no score": Bad({"prompt": "p", "completion": "a"}, SINGLES, error="no column 'score' .*; .* --columns score=NAME"),
    "no context": Bad(
        {"completions": COMPLETIONS["completions"]},
        [COMPLETIONS],
        error="no column 'context' .* --columns context=NAME",
    ),
}

MISTYPED = {
    "prompt": Bad(PAIR | {"prompt": 5}, error="'prompt' should hold a string or a list of messages, not the int 5"),
    "object as prompt": Bad(PAIR | {"prompt": ASK}, error="'prompt' should hold a string or a list of messages, not"),
    "strings as messages": Bad(PAIR | {"chosen": ["a"]}, error="'chosen' should hold messages with 'role' and"),
    "null message": Bad(PAIR | {"chosen": [None]}, error="'chosen' should hold messages with 'role' and 'content'"),
    "from and value": Bad(PAIR | {"chosen": [{"from": "gpt", "value": "a"}]}, error="'chosen' .* 'role' and 'content'"),
    "content parts": Bad(PAIR | {"chosen": [YES | {"content": [{"text": "a"}]}]}, error="'chosen' .* are strings"),
    "number as role": Bad(PAIR | {"chosen": [YES | {"role": 1}]}, error="'chosen' .* role and content are strings"),
    "true as chosen": Bad(PAIR | {"chosen": True}, error="'chosen' should hold a string or .*, not the bool True"),
    "huge text as margin": Bad(PAIR | {"margin": "2" * 10**6}, error=r"'margin' should hold a number, .{0,90}$"),
    "margin": Bad(PAIR | {"margin": "2"}, error="'margin' should hold a number, not the str '2'"),
    "truth as margin": Bad(PAIR | {"margin": True}, error="'margin' should hold a number, not the bool True"),
    "aspect": Bad(PAIR | {"aspect": 3}, error="'aspect' should hold a string, not the int 3"),
    "magnitude": Bad(
        MAGNITUDE | {"magnitude": "2"}, [MAGNITUDE], error="'magnitude' should hold a number, not the str"
    ),
    "responses": Bad(RANKS | {"responses": "abc"}, [RANKS], error="'responses' should hold a list, not the str 'abc'"),
    "response": Bad(
        RANKS | {"responses": ["a", 2, "c"]}, [RANKS], error="'responses' should hold a string or .* int 2"
    ),
    "ranks": Bad(RANKS | {"ranks": "123"}, [RANKS], error="'ranks' should hold a list, not the str '123'"),
    "rank": Bad(RANKS | {"ranks": [1, "2", 3]}, [RANKS], error="'ranks' should hold a number, not the str '2'"),
    "truth as rank": Bad(RANKS | {"ranks": [1, True, 3]}, [RANKS], error="'ranks' should hold a number, not the bool"),
    "list as rank": Bad(RANKS | {"ranks": [1, [2], 3]}, [RANKS], error="'ranks' should hold a number, not the list"),
    "score in a list": Bad(
        SCORES | {"scores": [1, "2", 3]}, [SCORES], error="'scores' should hold a number, not the str"
    ),
    "scores": Bad(SCORES | {"scores": 9}, [SCORES], error="'scores' should hold a list, not the int 9"),
    "score": Bad(SINGLE | {"score": "4"}, SINGLES, error="'score' should hold a number, not the str '4'"),
    "truth as score": Bad(SINGLE | {"score": True}, SINGLES, error="'score' should hold a number, not the bool True"),
    "completion": Bad(SINGLE | {"completion": 1}, SINGLES, error="'completion' should hold a string or a list of mess"),
    "completions": Bad(
        COMPLETIONS | {"completions": "a"}, [COMPLETIONS], error="'completions' should hold a list, not"
    ),
    "completion without rank": Bad(
        COMPLETIONS | {"completions": [{"completion": "a"}]},
        [COMPLETIONS],
        error="'completions' .* 'rank' and 'completi",
    ),
    "rank of a completion": Bad(
        COMPLETIONS | {"completions": [{"rank": "0", "completion": "a"}]},
        [COMPLETIONS],
        error="'completions' .* a number",
    ),
}

NO_COMPARISON = {
    "null prompt": Bad(PAIR | {"prompt": None}, dropped="null prompt"),
    "null chosen": Bad(PAIR | {"chosen": None}, dropped="null chosen"),
    "null content": Bad(PAIR | {"rejected": [NO | {"content": None}]}, dropped="null content"),
    "empty response": Bad(PAIR | {"chosen": ""}, dropped="empty response"),
    "blank response": Bad(PAIR | {"rejected": " \n\t\u2003"}, dropped="empty response"),
    "no messages": Bad(PAIR | {"rejected": []}, dropped="empty response"),
    "113,000 spaces alone": Bad(PAIR | {"rejected": " " * 113_000}, dropped="empty response"),
    "empty prompt": Bad(PAIR | {"prompt": ""}, dropped="empty prompt"),
    "prompt of a system turn": Bad(PAIR | {"prompt": [SYSTEM]}, dropped="empty prompt"),
    "response alone": Bad({"chosen": [YES], "rejected": [NO]}, dropped="empty prompt"),
    "empty inner turn": Bad(PAIR | {"prompt": [ASK, YES | {"content": ""}, MORE]}, dropped="empty turn in the prompt"),
    "identical responses": Bad(PAIR | {"rejected": "Because."}, dropped="identical responses"),
    "identical but for blanks": Bad(PAIR | {"rejected": " Because.\n"}, dropped="identical responses"),
    "prompts that differ": Bad({"chosen": [ASK, YES], "rejected": [MORE, NO]}, dropped="prompts differ"),
    "conversations of two lengths": Bad(
        {"chosen": [ASK, YES], "rejected": [ASK, YES, MORE, NO]}, dropped="prompts differ"
    ),
    "two user turns": Bad(PAIR | {"prompt": [ASK, MORE]}, dropped="consecutive turns of one role"),
    "two assistant turns": Bad(PAIR | {"prompt": [ASK, YES]}, dropped="consecutive turns of one role"),
    "late system turn": Bad(
        PAIR | {"prompt": [ASK, YES, SYSTEM, MORE]}, dropped="a system turn inside the conversation"
    ),
    "user as responder": Bad(PAIR | {"chosen": [MORE]}, dropped="the response is not an assistant turn"),
    "unknown role": Bad(PAIR | {"prompt": [ASK | {"role": "human"}]}, dropped="unknown role 'human'"),
    "role in capitals": Bad(PAIR | {"prompt": [ASK | {"role": "User"}]}, dropped="unknown role 'User'"),
    "huge role": Bad(PAIR | {"prompt": [ASK | {"role": "x" * 9999}]}, dropped=f"unknown role '{'x' * 20}'"),
    "tool calls": Bad(PAIR | {"chosen": [YES | {"tool_calls": [{"name": "f"}]}]}, dropped="tool calls"),
    "lone surrogate": Bad(PAIR | {"chosen": "a\ud800"}, dropped=SURROGATE),
    "lone surrogate in a message": Bad(PAIR | {"prompt": [ASK | {"content": "\udc00?"}]}, dropped=SURROGATE),
    "lone surrogate in the aspect": Bad(PAIR | {"aspect": "\udfff"}, dropped=SURROGATE),
    "surrogates the wrong way round": Bad(text(GOOD_LINE.replace("No.", r"\ude00\ud83d")), dropped=SURROGATE),
    "NaN margin": Bad(PAIR | {"margin": NAN}, dropped="margin is not a finite number"),
    "infinite margin": Bad(PAIR | {"margin": -INF}, dropped="margin is not a finite number"),
    "null margin": Bad(PAIR | {"margin": None}, dropped="margin is not a finite number"),
    "huge margin": Bad(PAIR | {"margin": 10**400}, dropped="margin is not a finite number"),
    "margin past the largest": Bad(
        text(GOOD_LINE[:-1] + ', "margin": 1e999}'), dropped="margin is not a finite number"
    ),
    "neutral": Bad(
        MAGNITUDE | {"magnitude": 0}, [MAGNITUDE], dropped="neutral: magnitude 0 (--ties keep would use it)"
    ),
    "magnitude of three": Bad(MAGNITUDE | {"magnitude": 3}, [MAGNITUDE], dropped="magnitude is not 0, 1 or 2"),
    "null magnitude": Bad(MAGNITUDE | {"magnitude": None}, [MAGNITUDE], dropped="magnitude is not a finite number"),
    "null responses": Bad(RANKS | {"responses": None}, [RANKS], dropped="null responses"),
    "null response": Bad(RANKS | {"responses": ["a", None, "b"]}, [RANKS], dropped="null response"),
    "no responses": Bad(RANKS | {"responses": [], "ranks": []}, [RANKS], dropped="fewer than two responses"),
    "one response": Bad(RANKS | {"responses": ["a"], "ranks": [1]}, [RANKS], dropped="fewer than two responses"),
    "an empty one of several": Bad(RANKS | {"responses": ["a", "", "b"]}, [RANKS], dropped="empty response"),
    "identical ones only": Bad(RANKS | {"responses": ["a"] * 3}, [RANKS], dropped="identical responses"),
    "too few ranks": Bad(RANKS | {"ranks": [1, 2]}, [RANKS], dropped="not one rank or score per response"),
    "too many scores": Bad(SCORES | {"scores": [1] * 4}, [SCORES], dropped="not one rank or score per response"),
    "null ranks": Bad(RANKS | {"ranks": None}, [RANKS], dropped="null ranks and scores"),
    "null rank": Bad(RANKS | {"ranks": [1, None, 3]}, [RANKS], dropped="ranks is not a finite number"),
    "gap": Bad(RANKS | {"ranks": [1, 2, 4]}, [RANKS], dropped=NO_ORDER),
    "ranks from 0": Bad(RANKS | {"ranks": [0, 1, 2]}, [RANKS], dropped=NO_ORDER),
    "ranks from 2": Bad(RANKS | {"ranks": [2, 3, 4]}, [RANKS], dropped=NO_ORDER),
    "negative ranks": Bad(RANKS | {"ranks": [-1, -2, -3]}, [RANKS], dropped=NO_ORDER),
    "halves of ranks": Bad(RANKS | {"ranks": [1, 2.5, 2.5]}, [RANKS], dropped=NO_ORDER),
    "huge ranks": Bad(RANKS | {"ranks": [1, 2, 10**30]}, [RANKS], dropped=NO_ORDER),
    "all tied": Bad(RANKS | {"ranks": [1, 1, 1]}, [RANKS], dropped="all responses tie (--ties keep would use them)"),
    "ranks against scores": Bad(SCORES | {"ranks": [3, 2, 1]}, [SCORES], dropped="ranks and scores disagree"),
    "null score": Bad(SCORES | {"scores": [1, None, 2]}, [SCORES], dropped="scores is not a finite number"),
    "NaN score": Bad(SCORES | {"scores": [1, NAN, 2]}, [SCORES], dropped="scores is not a finite number"),
    "infinite score": Bad(SCORES | {"scores": [1, INF, 2]}, [SCORES], dropped="scores is not a finite number"),
    "huge score": Bad(SCORES | {"scores": [1, 10**4000, 2]}, [SCORES], dropped="scores is not a finite number"),
    "null completions": Bad(COMPLETIONS | {"completions": None}, [COMPLETIONS], dropped="null completions"),
    "completions from 1": Bad(
        COMPLETIONS | {"completions": [{"rank": i, "completion": f"{i}"} for i in (1, 2)]},
        [COMPLETIONS],
        dropped=NO_ORDER,
    ),
    "null score of a completion": Bad(SINGLE | {"score": None}, SINGLES, dropped="score is not a finite number"),
    "null completion": Bad(SINGLE | {"completion": None}, SINGLES, dropped="null completion"),
    "empty completion": Bad(SINGLE | {"completion": " "}, SINGLES, dropped="empty response"),
    "completion alone": Bad(SINGLE | {"prompt": "x"}, SINGLES, dropped="the only completion of its prompt"),
}  # fmt: skip

KINDS = {
    f"{group}: {name}": bad
    for group, kinds in {
        "encoding": ENCODING,
        "strange": STRANGE,
        "columns": COLUMNS,
        "mistyped": MISTYPED,
        "no comparison": NO_COMPARISON,
    }.items()
    for name, bad in kinds.items()
}

PLAIN = text(GOOD_LINE + "\n")
ZIPPED = gzip.compress(b"".join(text(json.dumps(PAIR | {"id": i * 7919 % 1013}) + "\n") for i in range(2000)))
DAMAGED = r":\d+: the gzip file is cut off or damaged here \(.*\); fetch it again"
NOTHING = r"no usable row: .*: 0 rows read, 0 used, 0 dropped"

# Whole files: their bytes, and what the error says behind the file's name (or, of "no usable row", from the start on).
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", NOTHING),
    "blank lines": (b"\n  \n\r\n", NOTHING),
    "nothing is left": (
        text(json.dumps(PAIR | {"rejected": ""}) + "\n") * 4,
        r"no usable row: .* 4 rows read, 0 used, 4 dropped; 4 x empty response \(line 1, 2, 3, ...\)",
    ),
    "BOM alone": (b"\xef\xbb\xbf", ":1: not JSON"),
    "array that is cut off": (json.dumps([PAIR], indent=2).encode()[:-20], ":1: not JSON: .*; fix the array here"),
    "UTF-16": (text(GOOD_LINE, "utf-16"), ":1: not UTF-8"),
    "carriage returns only": (text(GOOD_LINE + "\r" + GOOD_LINE), ":1: not JSON"),
    "binary": (b"\x7fELF\x02\xff\x01" + bytes(range(256)), ":1: not UTF-8"),
    "archive": (b"PK\x03\x04\x14\x00\x00\x00\x08\x00\xff", ":1: not UTF-8"),
    "xz": (lzma.compress(PLAIN), ":1: not UTF-8"),
    "truncated gzip": (ZIPPED[: len(ZIPPED) // 2], DAMAGED),
    "gzip without end": (ZIPPED[:-6], DAMAGED),
    "gzip of a wrong sum": (ZIPPED[:-8] + bytes(8), DAMAGED),
    "gzip and junk": (ZIPPED + b"junk", DAMAGED),
    "gzip of no block": (ZIPPED[:10] + b"\xff" + ZIPPED[11:], DAMAGED),
    "gzip's first bytes": (b"\x1f\x8b", DAMAGED),
    "Parquet's first bytes": (b"PAR1", r": cannot be read \(.*\); fetch it again"),
    "Parquet cut off": (b"PAR1" + bytes(1000), r": cannot be read \(.*\); fetch it again"),
}
