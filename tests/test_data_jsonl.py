"""The quick way through a line of JSON gives what the thorough one gives, or leaves the line to it."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dwrl_fast.data.jsonl import _parse, _quick
from dwrl_fast.errors import DataError

ATOMS = (
    *("1", "-0", "1.5", "1e400", "NaN", "null", "true", "18446744073709551616", "123456789012345678901234567890"),
    *(r'""', r'"x"', r'"\\"', r'"a\":b"', r'"\\\":"', r'"\" :"', r'"\ud800"', r'"é\n"', '"\u2028"', '"a\tb"'),
)
KEYS = (r'"a"', r'"b"', r'"c\\"', r'"d\""', r'"\":"', r'"role"', r'"\u0061"')
COLONS = (":", ": ", " :", "\t:\t")


def spelled(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Arrays and objects as text; keys may occur twice."""
    pair = st.tuples(st.sampled_from(KEYS), st.sampled_from(COLONS), inner).map("".join)
    objects = st.lists(pair, max_size=4).map(lambda pairs: "{" + ", ".join(pairs) + "}")
    return objects | st.lists(inner, max_size=3).map(lambda items: "[" + ",".join(items) + "]")


@settings(max_examples=500)
@given(st.recursive(st.sampled_from(ATOMS), spelled, max_leaves=12))
@example('{"a": 1, "a": 2}')
@example('{"a": {"b": 1, "b": 2}}')
@example(r'{"a": 1, "a": 2, "c\\": 3}')  # the key that ends with a backslash is not counted
@example('{"a": 1, "a": 2, "b" : 3}')  # nor is the one with a blank behind it
@example(r'{"a": "\":", "a": 2}')
@example('{"a": 18446744073709551616}')
@example("[" * 5000 + "]" * 5000)
@example('{"a": ' * 1020 + "1" + "}" * 1020)
def test_the_quick_way_gives_the_same_or_nothing(text: str) -> None:
    raw = text.encode()
    if (found := _quick(raw)) is not None:
        assert repr(found) == repr(_parse(raw, "file:1"))


def test_ordinary_lines_go_the_quick_way() -> None:
    line = (
        '{"prompt": [{"role": "user", "content": "Why \\"so\\": \\u00e9?"}], "chosen": "7", "rejected": "9", "id": 3}'
    )
    assert _quick(line.encode()) == _parse(line.encode(), "file:1")
    assert _quick(line.replace('"id"', '"chosen"').encode()) is None
    assert isinstance(_parse(b'{"a": 1, "a": 2}', "file:1"), DataError)
