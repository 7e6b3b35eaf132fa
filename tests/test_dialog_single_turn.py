"""Single-turn prompts with prompt and responses: ids of the chat template, spans of the texts, labels, transcripts."""

from typing import Any

import pytest
from chats import CHATML, LONG, PROMPT, TRIMMING, applied, encoded, merging, word_level

from dwrl_fast.dialog import Dialog, SingleTurn, Template
from dwrl_fast.dialog.single_turn import transcript
from dwrl_fast.errors import TemplateError

COMPARE = Template("what is good ? {aspect} {prompt} A {response_a} B {response_b} .", labels=None, kind="pairwise")
DIRECT = Template("{prompt} hello {response_a} there {response_b}", labels=("six", "five"), kind="direct")
RATE = Template("{prompt}\n{response}\nis it {aspect}?", labels=None, kind="pointwise")


def test_ids_and_spans() -> None:
    tokenizer = word_level()
    pairwise = SingleTurn(tokenizer, COMPARE, "why")
    context = pairwise.context(PROMPT, ["five six", "hello there now"], aspect="six")
    text = "what is good ? six what is five ? A five six B hello there now ."
    assert context.ids == applied(tokenizer, [{"role": "user", "content": text}])
    assert tokenizer.decode(context.ids[context.response]) == "five six"
    assert context.second is not None and context.prompt == slice(0, context.response.start)
    assert tokenizer.decode(context.ids[context.second]) == "hello there <unk>"
    assert tokenizer.decode(context.ids[context.evaluate]).startswith("what is good ? six what")
    thought = encoded(tokenizer, "five <|im_end|>")
    sequence = pairwise.sequence(context, thought)
    assert sequence.ids == context.ids + thought and sequence.ids[sequence.thought] == thought
    assert sequence.ids[sequence.rate] == [] and not pairwise.counts
    swapped = pairwise.context(PROMPT, ["hello there now", "five six"], aspect="six")
    assert sorted(swapped.ids) == sorted(context.ids) and swapped.ids != context.ids


def test_labels_are_read_after_the_head() -> None:
    tokenizer = word_level()
    direct = SingleTurn(tokenizer, DIRECT)
    assert direct.label_ids == tuple(tokenizer.convert_tokens_to_ids(["six", "five"]))
    assert direct.special_ids() == dict(zip(("first_id", "second_id"), direct.label_ids, strict=True)) | {
        "end_id": direct.end_id
    }
    assert SingleTurn(tokenizer, COMPARE).label_ids is None
    with pytest.raises(TemplateError, match="label 'six six' one token"):
        SingleTurn(tokenizer, Template(DIRECT.evaluate, labels=("six six", "five"), kind="direct"))


@pytest.mark.parametrize("chat_template", [CHATML, TRIMMING], ids=["as it is", "trimmed"])
def test_spans_follow_a_trim(chat_template: str) -> None:
    """Also if a text that the chat template strips is first in the turn."""
    tokenizer: Any = merging("\n\n", "  ")
    tokenizer.chat_template = chat_template
    pointwise = SingleTurn(tokenizer, RATE)
    context = pointwise.context([{"role": "user", "content": "  \n why? "}], [" Six."])
    assert tokenizer.decode(context.ids[context.response]) == " Six."
    assert pointwise.counts == ({"trimmed": 1} if chat_template == TRIMMING else {})


def test_a_span_holds_what_merged_with_it() -> None:
    tokenizer = merging(".\n")
    context = SingleTurn(tokenizer, RATE).context(PROMPT, ["Six."])
    assert tokenizer.decode(context.ids[context.response]) == "Six.\n"
    assert context.ids == applied(
        tokenizer, [{"role": "user", "content": f"{PROMPT[0]['content']}\nSix.\nis it helpfulness?"}]
    )


def test_as_many_responses_as_the_kind_shows() -> None:
    with pytest.raises(ValueError, match="zip"):
        SingleTurn(word_level(), COMPARE).context(PROMPT, ["five"])


def test_transcripts() -> None:
    assert transcript(PROMPT) == "what is five ?"
    assert (
        transcript(LONG)
        == "System: the answer is six .\n\nUser: what is five ?\n\nAssistant: hello there\n\nUser: why ?"
    )


def test_a_dialog_needs_a_dialog() -> None:
    with pytest.raises(TemplateError, match="a template of kind pairwise where a dialog is needed"):
        Dialog(word_level(), COMPARE)
