"""The dialog's ids and spans with synthetic tokenizers equal the chat template's; thoughts are never re-encoded."""

import json
import logging
import subprocess
import sys

import pytest
from chats import CHATML, LETTERS, LONG, PROMPT, TEMPLATE, TRIMMING, applied, encoded, merging, messages, word_level

from dwrl_fast.data import Message
from dwrl_fast.dialog import Dialog, Template
from dwrl_fast.errors import TemplateError
from dwrl_fast.log import info_once


@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["one turn", "four turns"])
def test_ids_are_those_of_the_chat_template(prompt: list[Message]) -> None:
    tokenizer = word_level()
    dialog = Dialog(tokenizer, TEMPLATE, "hello")
    evaluate, rate = "what is good ? hello", "is the answer good ? hello"

    context = dialog.context(prompt, "there five .")
    sequence = dialog.sequence(context, encoded(tokenizer, "the answer is good <|im_end|>"))

    assert context.ids == applied(tokenizer, messages(prompt, "there five .", evaluate))
    assert sequence.ids == applied(tokenizer, messages(prompt, "there five .", evaluate, "the answer is good", rate))
    plain = dialog.plain(prompt, "there five .")
    assert plain.ids == applied(tokenizer, messages(prompt, "there five ."), head=False)
    assert plain.ids[-1] == dialog.end_id
    assert not dialog.counts


def test_spans_hold_the_texts() -> None:
    tokenizer = word_level()
    dialog = Dialog(tokenizer, TEMPLATE)
    context = dialog.context(LONG, "there five .", aspect="why")
    thought = encoded(tokenizer, "the answer is good <|im_end|>")
    sequence = dialog.sequence(context, thought)
    plain = dialog.plain(LONG, "there five .")

    for spans in (context, sequence, plain):
        assert tokenizer.decode(spans.ids[spans.response]) == "there five ."
        assert spans.prompt == slice(0, spans.response.start)
    assert sequence.ids[sequence.thought] == thought
    assert tokenizer.decode(sequence.ids[sequence.rate]) == "is the answer good ? why"
    assert "what is good ? why" in tokenizer.decode(context.ids)
    assert plain.ids[plain.thought] == plain.ids[plain.rate] == []


def test_settings_on_the_tokenizer_do_not_reach_the_dialog() -> None:
    tokenizer = word_level(pad=True)
    dialog = Dialog(tokenizer, TEMPLATE)
    before = dialog.context(LONG, "five").ids
    tokenizer(["five six"], truncation=True, max_length=2, padding="max_length")
    assert Dialog(tokenizer, TEMPLATE).context(LONG, "five").ids == dialog.context(LONG, "five").ids == before


def test_tails_of_thoughts() -> None:
    tokenizer = word_level(eos="<|eos|>")
    dialog = Dialog(tokenizer, TEMPLATE)
    context = dialog.context(PROMPT, "five")
    words = encoded(tokenizer, "the answer is good")
    end, eos = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|eos|>"))
    assert (dialog.end_id, dialog.stop_ids) == (end, (end, eos))

    ended, cut, other, empty = (dialog.sequence(context, ids) for ids in ([*words, end], words, [*words, eos], []))

    tail = cut.ids[cut.thought.stop :]
    assert tail[0] == end
    assert ended.ids == cut.ids == context.ids + words + tail
    assert other.ids == [*context.ids, *words, eos, *tail]
    assert empty.ids == context.ids + tail
    for sequence, trained in ((ended, [*words, end]), (cut, words), (other, [*words, eos]), (empty, [])):
        assert sequence.ids[sequence.thought] == trained
        assert tokenizer.decode(sequence.ids[sequence.rate]) == "is the answer good ? helpfulness".replace(
            "helpfulness", "<unk>"
        )


def test_thoughts_are_not_re_encoded() -> None:
    tokenizer = merging("hi")
    dialog = Dialog(tokenizer, LETTERS)
    letters = encoded(tokenizer, "h") + encoded(tokenizer, "i")
    assert encoded(tokenizer, tokenizer.decode(letters)) != letters
    sequence = dialog.sequence(dialog.context(PROMPT, "five"), letters)
    assert sequence.ids[sequence.thought] == letters


def test_trimming_is_followed_and_counted() -> None:
    tokenizer = merging("  ", "\n\n")
    tokenizer.chat_template = TRIMMING
    dialog = Dialog(tokenizer, Template(" is it good ? ", "rate it {aspect}\n", LETTERS.labels), "x")
    assert not dialog.counts
    prompt: list[Message] = [{"role": "user", "content": "\nwhat is five ? "}]
    for response in ("five", " five \n"):
        dialog.counts.clear()
        context = dialog.context(prompt, response)
        sequence = dialog.sequence(context, encoded(tokenizer, "six"))
        turns = messages(prompt, response, " is it good ? ", "six", "rate it x\n")
        assert sequence.ids == applied(tokenizer, turns)
        assert tokenizer.decode(sequence.ids[sequence.response]) == "five"
        assert dialog.counts == {"trimmed": 1}


def test_merged_rows_are_kept_and_counted() -> None:
    tokenizer = merging("\n\n")
    dialog = Dialog(tokenizer, LETTERS)
    context = dialog.context(PROMPT, "\nfive")
    assert tokenizer.decode(context.ids[context.response]) == "\nfive"
    assert context.ids != applied(tokenizer, messages(PROMPT, "\nfive", dialog.template.evaluate))
    dialog.plain(PROMPT, "\nfive")
    assert dialog.counts == {"merged": 2}


def test_contents_that_only_the_template_changes_are_kept_and_counted() -> None:
    tokenizer = word_level(CHATML.replace("message.content", "message.content | replace('six', 'five')"))
    dialog = Dialog(tokenizer, TEMPLATE)
    context = dialog.context(PROMPT, "six")
    assert tokenizer.decode(context.ids[context.response]) == "six"
    assert dialog.counts["rewritten"] == 1


def test_no_pad_token_is_added() -> None:
    without, with_pad = word_level(), word_level(pad=True)
    size = len(without)
    assert Dialog(without, TEMPLATE).pad_id == without.convert_tokens_to_ids("<|eos|>"), (
        "any id but one that ends turns"
    )
    assert Dialog(with_pad, TEMPLATE).pad_id == with_pad.pad_token_id
    assert len(without) == size
    assert Dialog(without, TEMPLATE).stop_ids == (without.eos_token_id,)


def test_the_date_is_pinned_and_said(caplog: pytest.LogCaptureFixture) -> None:
    info_once.cache_clear()
    dated = word_level("{{ date_string }} {{ strftime_now('%-d %B %Y %H') }} " + CHATML)
    dated.add_tokens(["2024", "July", "26", "00"])
    with caplog.at_level(logging.INFO, "dwrl_fast"):
        dialog = Dialog(dated, TEMPLATE)
        Dialog(dated, TEMPLATE)
    assert [record.message for record in caplog.records if "26 Jul 2024" in record.message] == caplog.messages
    assert len(caplog.messages) == 1
    shown = dated.convert_ids_to_tokens(dialog.context(PROMPT, "five").ids)
    assert shown[:7] == ["26", "<unk>", "2024", "26", "July", "2024", "00"]
    blank = merging()
    made = []
    for year in ("2024", "{{ strftime_now('%Y') }}"):
        blank.chat_template = "\n  {% set space = ' ' %}" + year + CHATML
        made.append(Dialog(blank, LETTERS).context(PROMPT, "five").ids)
    assert made[0] == made[1]


def test_the_saved_form_comes_back() -> None:
    dialog = Dialog(word_level(), Template("why {aspect}", "good ? {aspect}", ("good", "six")), "five")
    saved = json.loads(json.dumps(dialog.to_dict()))
    again = Dialog.from_dict(word_level(), saved)
    assert (again.template, again.aspect, again.yes_id, again.no_id) == (
        dialog.template,
        "five",
        dialog.yes_id,
        dialog.no_id,
    )
    assert again.to_dict() == saved
    with pytest.raises(TemplateError, match="is not the tokenizer this model was trained with"):
        Dialog.from_dict(word_level(), saved | {"yes_id": 3})
    with pytest.raises(TemplateError, match="the saved dialog has no 'no_id'"):
        Dialog.from_dict(word_level(), {key: value for key, value in saved.items() if key != "no_id"})


def test_importing_it_loads_neither_transformers_nor_tokenizers() -> None:
    code = (
        "import sys, dwrl_fast.dialog; sys.exit(not {'transformers', 'tokenizers', 'jinja2'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
