"""Requests and groups made from preferences, against sequences and lists written by hand."""

import dataclasses

import pytest
from judging import DIRECT, PAIRWISE, POINTWISE, single_turn
from tiny import tiny_dialog

from dwrl_fast.data import Dataset, Demonstration, Message, Preference
from dwrl_fast.dialog import Dialog, SingleTurn, Template, TokenSequence
from dwrl_fast.encode import (
    Comparison,
    Group,
    Request,
    Thought,
    both_orders,
    closed_groups,
    comparison_requests,
    completion_groups,
    demonstration_group,
    drawn_orders,
    drop_long,
    fit,
    label_groups,
    plain_groups,
    read_thoughts,
    response_requests,
)
from dwrl_fast.errors import DataError, TemplateError

PROMPT: tuple[Message, ...] = ({"role": "user", "content": "3 5"},)
PAIR = Preference(PROMPT, ("1", "2 2"), source="f:1")
TIED = Preference(PROMPT, ("1", "2 2", "4"), ranks=(1, 1, 2), source="f:2")
RATIONALIZER = Template("compare {prompt} A {response_a} B {response_b} {verdict}", labels=None, kind="rationalizer")


def words(dialog: Dialog | SingleTurn, sequence: TokenSequence, part: slice = slice(None)) -> str:
    return str(dialog.tokenizer.decode(sequence.ids[part], skip_special_tokens=False))


def thoughts(dialog: Dialog | SingleTurn, *texts: str) -> list[Thought]:
    """Thoughts that end with a stop token, with different log-probs and rewards."""
    found = []
    for number, text in enumerate(texts):
        ids = dialog.thought_ids(text)
        found.append(Thought(ids, [-float(number)] * len(ids), True, reward=float(number)))
    return found


def test_both_orders_of_every_two_responses() -> None:
    assert both_orders(PAIR) == [Comparison(0, 1, 0), Comparison(1, 0, 1)]
    assert both_orders(TIED) == [
        *(Comparison(0, 1, None), Comparison(0, 2, 0), Comparison(1, 0, None)),
        *(Comparison(1, 2, 0), Comparison(2, 0, 1), Comparison(2, 1, 1)),
    ]
    assert Comparison(2, 1, 1).places == (2, 1)


def test_drawn_orders_show_every_untied_two_once_in_either_order() -> None:
    rows = [TIED] * 200
    drawn = drawn_orders(rows, seed=3)
    assert {frozenset(frozenset(each.places) for each in some) for some in drawn} == {
        frozenset({frozenset({0, 2}), frozenset({1, 2})})
    }
    assert all(len(some) == 2 for some in drawn)
    assert all(each.right == each.places.index(min(each.places)) for some in drawn for each in some)
    swapped = sum(each.right or 0 for some in drawn for each in some)
    assert 160 < swapped < 240, "400 fair coins: 4 standard deviations are 40"
    assert drawn == drawn_orders(rows, seed=3) != drawn_orders(rows, seed=4)


def test_an_order_is_drawn_for_tied_responses_too() -> None:
    """The draws of later pairs do not depend on which responses tie."""
    free = Preference(PROMPT, TIED.responses)
    for seed in range(8):
        (some,), (every,) = drawn_orders([TIED], seed), drawn_orders([free], seed)
        assert [each.places for each in some] == [each.places for each in every if set(each.places) != {0, 1}]


def test_the_drawn_order_of_one_row_is_the_generators() -> None:
    """The draws of a seed are fixed, because runs must be reproducible."""
    assert [each.right for some in drawn_orders([PAIR] * 8, seed=0) for each in some] == [1, 0, 0, 0, 1, 1, 1, 1]


def test_plain_and_completion_groups() -> None:
    dialog = tiny_dialog()
    (plain,), (completion,) = plain_groups([PAIR], dialog), completion_groups([PAIR], dialog)
    expected = ["<|user|> 3 5 <|end|> <|assistant|> 1 <|end|>", "<|user|> 3 5 <|end|> <|assistant|> 2 2 <|end|>"]
    for group in (plain, completion):
        assert [words(dialog, sequence) for (sequence,) in group.sequences] == expected
        assert group.preference is PAIR and group.thoughts == [] and group.labels == []
    assert [words(dialog, s, s.thought) for s in completion.flat] == ["1 <|end|>", "2 2 <|end|>"]
    assert [words(dialog, s, s.thought) for s in plain.flat] == ["", ""]


def test_a_group_says_what_it_holds() -> None:
    dialog = tiny_dialog()
    (group,) = plain_groups([TIED], dialog)
    assert group.ranks == (1, 1, 2) and plain_groups([PAIR], dialog)[0].ranks == (1, 2)
    assert [len(sequence.ids) for sequence in group.flat] == [7, 8, 7] and group.longest == 8
    assert group.rewards == [] and group != dataclasses.replace(group)


def test_new_log_probs_and_rewards_make_a_new_group() -> None:
    dialog = tiny_dialog()
    requests = response_requests([PAIR], dialog)
    (group,) = closed_groups(requests, [thoughts(dialog, "3", "4 4"), thoughts(dialog, "ok", "bad")], dialog)
    fresh = [[[-1.0, -2.0], [-3.0, -4.0, -5.0]], [[-6.0, -7.0], [-8.0, -9.0]]]
    again = group.with_logprobs(fresh)
    assert [[each.logprobs for each in some] for some in again.thoughts] == fresh
    assert again.rewards == group.rewards == [[0.0, 1.0], [0.0, 1.0]]
    assert group.thoughts[0][1].logprobs == [-1.0] * 3, "a group is never written into"
    rewarded = group.with_rewards([[0.25, 0.5], [0.75, 1.0]])
    assert rewarded.rewards == [[0.25, 0.5], [0.75, 1.0]]
    assert rewarded.thoughts[1][1].logprobs == group.thoughts[1][1].logprobs and rewarded.sequences is group.sequences
    for wrong in (fresh[:1], [fresh[0], fresh[1][:1]]):
        with pytest.raises(ValueError, match="shorter"):
            group.with_logprobs(wrong)
    with pytest.raises(ValueError, match="shorter"):
        group.with_rewards([[1.0, 2.0]])


def test_log_probs_of_a_completion_stand_for_a_thought() -> None:
    dialog = tiny_dialog()
    (group,) = completion_groups([PAIR], dialog)
    made = group.with_logprobs([[[-1.0, -2.0]], [[-3.0, -4.0, -5.0]]])
    assert [[each.ids for each in some] for some in made.thoughts] == [[s.ids[s.thought]] for s in group.flat]
    assert [each.logprobs for some in made.thoughts for each in some] == [[-1.0, -2.0], [-3.0, -4.0, -5.0]]
    assert all(each.ended and each.reward is None for some in made.thoughts for each in some)
    assert made.rewards == [[], []]


def test_a_response_is_asked_about_alone() -> None:
    dialog, pointwise = tiny_dialog(), single_turn(POINTWISE)
    (request,) = response_requests([PAIR], dialog)
    assert [dialog.tokenizer.decode(context.ids) for context in request.contexts] == [
        f"<|user|> 3 5 <|end|> <|assistant|> {response} <|end|> <|user|> check <|end|> <|assistant|>"
        for response in PAIR.responses
    ]
    assert request == Request(PAIR, request.contexts, [])
    (alone,) = response_requests([PAIR], pointwise)
    assert [pointwise.tokenizer.decode(context.ids) for context in alone.contexts] == [
        f"<|user|> score 3 5 {response} <|end|> <|assistant|>" for response in PAIR.responses
    ]


@pytest.mark.parametrize("tell_verdict", [False, True])
def test_comparisons_are_asked_in_their_order_and_none_for_a_row_without_any(tell_verdict: bool) -> None:
    dialog = single_turn(RATIONALIZER if tell_verdict else PAIRWISE)
    comparisons = [[Comparison(1, 0, 1), Comparison(0, 1, 0)], [], [Comparison(2, 0, 1)]]
    found = comparison_requests([PAIR, PAIR, TIED], comparisons, dialog, tell_verdict=tell_verdict)
    assert [(request.preference, request.comparisons) for request in found] == [
        (PAIR, comparisons[0]),
        (TIED, comparisons[2]),
    ]
    said = [[dialog.tokenizer.decode(context.ids) for context in request.contexts] for request in found]
    shown = [[("2 2", "1", "B"), ("1", "2 2", "A")], [("4", "1", "B")]]
    assert said == [
        [
            f"<|user|> compare 3 5 A {a} B {b}{f' {verdict}' * tell_verdict} <|end|> <|assistant|>"
            for a, b, verdict in some
        ]
        for some in shown
    ]


def test_a_question_is_given_no_verdict_unless_told() -> None:
    with pytest.raises(KeyError, match="verdict"):
        comparison_requests([PAIR], [both_orders(PAIR)], single_turn(RATIONALIZER))


def test_thoughts_close_the_contexts_request_after_request() -> None:
    dialog = tiny_dialog()
    requests = response_requests([PAIR, TIED], dialog)
    texts = [["0", "1"], ["2", "3"], ["4"], ["5"], ["6"]]
    given = [thoughts(dialog, *some) for some in texts]
    groups = closed_groups(requests, given, dialog)
    assert [group.preference for group in groups] == [PAIR, TIED]
    assert [group.thoughts for group in groups] == [given[:2], given[2:]]
    for group, some in zip(groups, (texts[:2], texts[2:]), strict=True):
        assert read_thoughts(group, dialog, lambda text: text.removesuffix("<|end|>").strip()) == some
        for response, sequences in zip(group.preference.responses, group.sequences, strict=True):
            start = f"<|user|> 3 5 <|end|> <|assistant|> {response} <|end|> <|user|> check <|end|> <|assistant|> "
            assert all(words(dialog, sequence).startswith(start) for sequence in sequences)
    with pytest.raises(StopIteration):
        closed_groups(requests, given[:-1], dialog)


def test_what_is_read_sees_special_tokens() -> None:
    dialog = tiny_dialog()
    groups = closed_groups(response_requests([PAIR], dialog), [thoughts(dialog, "3"), thoughts(dialog, "4")], dialog)
    assert read_thoughts(groups[0], dialog, str) == [["3 <|end|>"], ["4 <|end|>"]]


def test_a_label_is_read_without_a_thought() -> None:
    dialog = single_turn(DIRECT)
    requests = comparison_requests([PAIR], [both_orders(PAIR)], dialog)
    (group,) = label_groups(requests, dialog)
    assert [words(dialog, sequence) for sequence in group.flat] == [
        "<|user|> compare 3 5 A 1 B 2 2 <|end|> <|assistant|>",
        "<|user|> compare 3 5 A 2 2 B 1 <|end|> <|assistant|>",
    ]
    assert [len(some) for some in group.sequences] == [1, 1] and group.thoughts == []
    assert all(sequence.thought.start == sequence.thought.stop == len(sequence.ids) for sequence in group.flat)


def demonstration(responses: tuple[str, ...], thought: str, verdict: str) -> Demonstration:
    return Demonstration(PROMPT, responses, thought=thought, verdict=verdict, source="f:3")


def test_a_demonstrated_dialog_ends_in_a_label() -> None:
    dialog = tiny_dialog()
    for number, verdict in enumerate(("Yes", "No")):
        row = demonstration(("1",), "4 ok", verdict)
        group = demonstration_group(row, dialog)
        assert (group.preference, group.labels, group.thoughts) == (row, [number], [])
        (sequence,) = group.flat
        assert words(dialog, sequence, sequence.thought) == "4 ok <|end|>"
        assert words(dialog, sequence).endswith("4 ok <|end|> <|user|> rate <|end|> <|assistant|>")


@pytest.mark.parametrize(
    ("template", "responses", "thought", "verdict", "trained"),
    [
        (PAIRWISE, ("1", "2"), "4", "A", "4 <answer>[[A]]</answer> <|end|>"),
        (PAIRWISE, ("1", "2"), "", "B", "<answer>[[B]]</answer> <|end|>"),
        (PAIRWISE, ("1", "2"), "4 <answer>[[B]]</answer>", "", "4 <answer>[[B]]</answer> <|end|>"),
        (POINTWISE, ("1",), "4 <s> 7 </s>", "", "4 <s> 7 </s> <|end|>"),
    ],
)
def test_a_demonstrated_verdict_stands_behind_its_thought(
    template: Template, responses: tuple[str, ...], thought: str, verdict: str, trained: str
) -> None:
    dialog = single_turn(template)
    group = demonstration_group(demonstration(responses, thought, verdict), dialog)
    (sequence,) = group.flat
    assert words(dialog, sequence, sequence.thought) == trained and group.labels == []


def test_a_demonstrated_label_has_no_thought() -> None:
    dialog = single_turn(DIRECT)
    group = demonstration_group(demonstration(("1", "2"), " ", "B"), dialog)
    assert group.labels == [1] and group.flat[0].thought == slice(*[len(group.flat[0].ids)] * 2)
    with pytest.raises(TemplateError, match="the row has a thought, but a template of kind direct has none"):
        demonstration_group(demonstration(("1", "2"), "4", "B"), dialog)


@pytest.mark.parametrize(
    ("template", "responses", "thought", "verdict", "said"),
    [
        (None, ("1", "2"), "4", "Yes", "not 1 responses, the number that a template of kind dialog shows"),
        (PAIRWISE, ("1",), "4", "A", "not 2 responses, the number that a template of kind pairwise shows"),
        (None, ("1",), "4", "Maybe", "not one of the template's labels, Yes and No"),
        (PAIRWISE, ("1", "2"), "4", "", "no verdict, neither as a column nor at the end of the thought"),
        (PAIRWISE, ("1", "2"), "4", "C", "not one that a template of kind pairwise asks for"),
        (POINTWISE, ("1",), "4", "11", "not one that a template of kind pointwise asks for"),
    ],
)
def test_a_demonstration_that_the_template_does_not_ask_for(
    template: Template | None, responses: tuple[str, ...], thought: str, verdict: str, said: str
) -> None:
    dialog = tiny_dialog() if template is None else single_turn(template)
    with pytest.raises(TemplateError, match=said):
        demonstration_group(demonstration(responses, thought, verdict), dialog)


def test_what_fits_is_measured_in_tokens() -> None:
    """Prompt and longest response, <|user|> 3 5 <|end|> <|assistant|> 2 2, are 7 tokens. With the evaluate turn, an
    empty thought and the rate turn they are 17.
    """
    dialog = tiny_dialog()
    assert fit(PAIR, dialog, 7) == (17, "")
    assert fit(PAIR, dialog, 6) == (0, "longer than --max_length 6 tokens")


def test_what_is_shown_together_fits_together() -> None:
    """<|user|> compare 3 5 A 1 B 2 2 are 9 tokens up to the end of the second response, in both orders."""
    dialog = single_turn(PAIRWISE)
    assert fit(PAIR, dialog, 9) == (11, "")
    assert fit(PAIR, dialog, 8) == (0, "longer than --max_length 8 tokens")
    three = Preference(PROMPT, ("1", "2 2", "3 3 3"))
    assert fit(three, dialog, 11) == (13, "") and fit(three, dialog, 10)[1], "any two of the three"


def test_a_whole_demonstration_fits() -> None:
    dialog = tiny_dialog()
    row = demonstration(("1",), "4 ok", "Yes")
    size = len(demonstration_group(row, dialog).flat[0].ids)
    assert fit(row, dialog, size) == (size, "")
    assert fit(row, dialog, size - 1) == (0, f"longer than --max_length {size - 1} tokens")
    tokens, reason = fit(demonstration(("1",), "4", "Maybe"), dialog, 99)
    assert tokens == 0 and reason.startswith("the verdict is not one")


def test_long_groups_are_left_out_and_the_longest_other_is_told() -> None:
    dialog = tiny_dialog()
    told: list[int] = []
    long = Preference(PROMPT, ("1", "2 2 2"), source="f:4")
    short = Preference(PROMPT, ("1", "2"), source="f:5")
    dataset = Dataset("f", rows=[PAIR, long, short])
    assert drop_long(dataset, dialog, 7, told.append) == 17
    assert dataset.rows == [PAIR, short] and told == [1, 1, 1]
    assert dict(dataset.dropped) == {"longer than --max_length 7 tokens": [4]}
    with pytest.raises(DataError, match=r"Nothing is left: raise --max_length"):
        drop_long(dataset, dialog, 5, told.append)


def test_a_group_holds_sequences_of_the_row_it_names() -> None:
    """Groups are compared by identity: two groups of the same row are different."""
    dialog = tiny_dialog()
    one, other = plain_groups([PAIR, PAIR], dialog)
    assert one != other and len({one, other}) == 2 and one.preference is other.preference
    assert Group(PAIR, one.sequences) != one
