"""Groups of random ids, for tests of the layouts."""

from hypothesis import strategies as st

from dwrl_fast.data import Preference
from dwrl_fast.dialog import TokenSequence
from dwrl_fast.encode import Group, Thought


def make_sequence(ids: list[int], start: int, stop: int) -> TokenSequence:
    """`ids` with the thought at [start, stop); the other spans do not matter."""
    return TokenSequence(ids, slice(0, 1), slice(1, start), slice(start, stop), slice(stop, len(ids)))


def make_group(responses: list[list[TokenSequence]]) -> Group:
    """A group whose old log-probs and flags differ between thoughts, so that a swap is detected."""
    count = iter(range(1000))

    def thought(s: TokenSequence) -> Thought:
        ids = s.ids[s.thought]
        return Thought(ids, [-float(next(count))] * len(ids), s.ids[-1] % 2 == 0)

    thoughts = [[thought(s) for s in row] for row in responses]
    return Group(Preference((), tuple("abcdefgh"[: len(responses)])), responses, thoughts)


def whole(*ids: list[int]) -> Group:
    """One response; each thought is everything except the first token."""
    return make_group([[make_sequence(i, 1, len(i)) for i in ids]])


@st.composite
def drawn_groups(draw: st.DrawFn) -> list[Group]:
    """Ids from a vocabulary of one to three letters, so that prefixes are shared at random places, within groups,
    between groups, or completely.
    """
    letter = st.integers(0, draw(st.integers(0, 2)))

    def run(least: int, most: int) -> list[int]:
        return draw(st.lists(letter, min_size=least, max_size=most))

    groups = []
    for _ in range(draw(st.integers(1, 4))):
        prompt, responses = run(1, 4), []
        for _ in range(draw(st.integers(1, 5))):
            context = prompt + run(0, 3)
            tail = run(0, 2)
            thoughts = [run(0, 4) for _ in range(draw(st.integers(1, 3)))]
            responses.append([make_sequence(context + t + tail, len(context), len(context + t)) for t in thoughts])
        groups.append(make_group(responses))
    return groups
