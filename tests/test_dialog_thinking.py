"""Chat templates with think blocks: the sampled sequence is a prefix of the scored one, and a log line says so."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML, PROMPT, TEMPLATE, applied, contents_of, encoded, messages, real_tokenizer, word_level

from dwrl_fast.data import Message
from dwrl_fast.dialog import Dialog, SingleTurn, Thinking, load_template
from dwrl_fast.errors import TemplateError
from dwrl_fast.log import info_once

# Like Qwen3's: a think block is shown only in the last turn and removed from earlier ones; with thinking off, the
# generation head has an empty block.
CUT = "{% set said = m.content.split('</think>')[-1].lstrip('\n') if '</think>' in m.content else m.content %}"
SWITCHED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + CUT + "{% if loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Like DeepSeek-R1's distilled models: no switch, every head opens a block, and earlier turns show only the text after
# it.
OPENING = (
    "<|begin|>{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}"
    "<|end|>{% else %}{{ '' if m.role == 'system' else '<|User|>' }}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# Like Qwen3.5's: the switch chooses between an open and an empty block.
EITHER = SWITCHED.replace("</think>\n\n{% endif %}{% endif %}", "</think>\n\n{% else %}<think>\n{% endif %}{% endif %}")
THINK = ("<think>", "</think>")
ADDED = {SWITCHED: THINK, EITHER: THINK, OPENING: (*THINK, "<|begin|>", "<|Assistant|>", "<|User|>", "<|end|>")}
EMPTY = "<think>\n\n</think>\n\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(autouse=True)
def one_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwrl_fast.dialog.chat.ContentTokenizer", contents_of)
    info_once.cache_clear()


def thinking(shared: Path, template: str, enable_thinking: Thinking = "auto") -> tuple[Any, Dialog]:
    tokenizer = real_tokenizer(shared, "qwen2.5", template, *ADDED[template])
    return tokenizer, Dialog(tokenizer, enable_thinking=enable_thinking)


def texts(tokenizer: Any, dialog: Dialog, thought: str) -> tuple[str, str]:
    """The context, and the scored text after it."""
    context = dialog.context(PROMPT, "Six.")
    sequence = dialog.sequence(context, encoded(tokenizer, thought))
    assert sequence.ids[: len(context.ids)] == context.ids
    assert sequence.ids[sequence.thought] == encoded(tokenizer, thought)
    return tokenizer.decode(context.ids), tokenizer.decode(sequence.ids[len(context.ids) :])


@pytest.mark.parametrize("template", [SWITCHED, EITHER], ids=["switched", "either"])
@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_off_keeps_the_empty_block_that_the_sampler_saw(
    shared: Path, template: str, wanted: Thinking, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dwrl_fast"):
        tokenizer, dialog = thinking(shared, template, wanted)
        thinking(shared, template, wanted)
    assert [("an empty think block" in message) for message in caplog.messages] == [True], "said, and once"
    assert dialog.enable_thinking == "off"
    evaluate, rate = (text.format(aspect="helpfulness") for text in (dialog.template.evaluate, dialog.template.rate))
    context = dialog.context(PROMPT, "Six.")
    sampled = tokenizer.apply_chat_template(
        messages(PROMPT, "Six.", evaluate), add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert context.ids == sampled, "the sampler's ids are the template's own"
    before, after = texts(tokenizer, dialog, "Fine.<|im_end|>")
    assert before.endswith(TURN + EMPTY) and before.count("<think>") == 1
    assert after.endswith(rate + TURN + EMPTY)
    whole = applied(tokenizer, messages(PROMPT, "Six.", evaluate, "Fine.", rate))
    kept = tokenizer.decode(whole).replace(TURN + "Fine.", TURN + EMPTY + "Fine.")
    assert (before + after).removesuffix(EMPTY) == kept.removesuffix("<think>\n")


def test_on_keeps_the_whole_thought_and_reads_the_label_without_one(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thought = "<think>\nHm.\n</think>\n\nFine.<|im_end|>"
    with caplog.at_level(logging.INFO, "dwrl_fast"):
        tokenizer, dialog = thinking(shared, SWITCHED, "on")
    assert "including its think block" in caplog.text
    before, after = texts(tokenizer, dialog, thought)
    assert before.endswith(TURN) and "<think>" not in before
    assert after.startswith(thought) and after.endswith("Answer Yes or No." + TURN + EMPTY)

    tokenizer, dialog = thinking(shared, EITHER, "on")
    before, after = texts(tokenizer, dialog, "Hm.\n</think>\n\nFine.<|im_end|>")
    assert before.endswith(TURN + "<think>\n") and after.endswith(TURN + EMPTY)


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_a_head_that_always_opens_a_block(shared: Path, wanted: Thinking, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dwrl_fast"):
        tokenizer, dialog = thinking(shared, OPENING, wanted)
    assert "it is scored unchanged" in caplog.text and dialog.enable_thinking == "on"
    thought = "Hm.\n</think>\n\nFine.<|end|>"
    before, after = texts(tokenizer, dialog, thought)
    assert before.endswith("<|Assistant|><think>\n") and after.startswith(thought + "<|User|>")
    assert after.endswith("Answer Yes or No.<|Assistant|>"), "where the template itself shows a turn without reasoning"
    label = tokenizer.decode([dialog.yes_id])
    shown = tokenizer.apply_chat_template(
        messages(messages(PROMPT, "Six.", "Why?", "Fine.", "Good?"), label), tokenize=False
    )
    assert shown.endswith(f"Good?<|Assistant|>{label}<|end|>")


def test_what_cannot_be_had_is_refused_with_the_alternative(shared: Path) -> None:
    with pytest.raises(TemplateError, match=r"opens a think block in every generation head.*--enable_thinking on"):
        thinking(shared, OPENING, "off")
    with pytest.raises(TemplateError, match=r"does not support enable_thinking.*leave --enable_thinking at auto"):
        Dialog(word_level(), enable_thinking="on")
    assert Dialog(word_level(), TEMPLATE, enable_thinking="off").enable_thinking == "off"
    marking = "{% if enable_thinking %}<|eos|>{% endif %}" + CHATML
    Dialog(word_level(marking), TEMPLATE, enable_thinking="off")
    with pytest.raises(TemplateError, match=r"differently once others follow.*--enable_thinking off"):
        Dialog(word_level(marking), TEMPLATE, enable_thinking="on")


@pytest.mark.parametrize("template", [SWITCHED, OPENING], ids=["switched", "opening"])
def test_reasoning_in_a_text_is_kept_and_counted(shared: Path, template: str) -> None:
    tokenizer, dialog = thinking(shared, template)
    response = "<think>\nFive and one.\n</think>\n\nSix."
    context = dialog.context(PROMPT, response)
    assert tokenizer.decode(context.ids[context.response]) == response
    usual = dialog.context(PROMPT, "Six.")
    control = set(tokenizer.added_tokens_decoder)
    assert [i for i in context.ids if i in control] == [i for i in usual.ids if i in control], "as text"
    assert dialog.counts == {"reasoning kept": 1, "control text": 1}


def test_plain_turns_are_the_templates(shared: Path) -> None:
    """The input of a reward head: Qwen3 shows an empty block before the last turn."""
    tokenizer, dialog = thinking(shared, SWITCHED)
    ids = dialog.plain(PROMPT, "Six.").ids
    assert ids == applied(tokenizer, messages(PROMPT, "Six."), head=False)[: len(ids)]
    assert tokenizer.decode(ids).endswith(EMPTY + "Six.<|im_end|>")


@pytest.mark.parametrize("wanted", ["off", "on"])
def test_single_turns(shared: Path, wanted: Thinking) -> None:
    tokenizer, _ = thinking(shared, EITHER)
    pairwise = SingleTurn(tokenizer, load_template("pairwise"), enable_thinking=wanted)
    direct = SingleTurn(tokenizer, load_template("direct"), enable_thinking=wanted)
    head = EMPTY if wanted == "off" else "<think>\n"
    assert tokenizer.decode(pairwise.context(PROMPT, ["Six.", "Five."]).ids).endswith(TURN + head)
    assert tokenizer.decode(direct.context(PROMPT, ["Six.", "Five."]).ids).endswith(TURN + EMPTY), "a label at once"


def test_it_is_saved(shared: Path) -> None:
    tokenizer, dialog = thinking(shared, SWITCHED, "on")
    saved = dialog.to_dict()
    again = Dialog.from_dict(tokenizer, saved)
    assert (again.enable_thinking, again.to_dict()) == ("on", saved)
    before = {key: value for key, value in saved.items() if key != "enable_thinking"}
    assert Dialog.from_dict(tokenizer, before).enable_thinking == "off", "saved before there was a choice"


PUBLISHED = {  # by TRL, which keeps copies of the models' own
    "qwen3": (("auto", TURN + EMPTY), ("on", TURN)),
    "qwen3_vl": (("auto", TURN),),
    "qwen3_instruct_2507": (("auto", TURN),),
    "qwen3_5_think": (("auto", TURN + EMPTY), ("on", TURN + "<think>\n")),
    "deepseek_r1_distill": (("auto", "<|Assistant|><think>\n".replace("|", "｜")),),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(shared: Path, name: str) -> None:
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("TRL, which holds copies of the published chat templates, is not installed")
    path = Path(found.origin).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this TRL has no {path.name}")
    added = (*THINK, "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
    tokenizer = real_tokenizer(shared, "qwen2.5", path.read_text(encoding="utf-8"), *added)
    prompt: list[Message] = [{"role": "system", "content": "Be brief."}, *PROMPT, *messages([], "Six."), *PROMPT]
    for wanted, end in PUBLISHED[name]:
        dialog = Dialog(tokenizer, enable_thinking=wanted)  # type: ignore[arg-type]
        context = dialog.context(prompt, "Six.")
        assert tokenizer.decode(context.ids).endswith(end)
        assert dialog.sequence(context, [5]).ids[: len(context.ids)] == context.ids
        assert not dialog.counts
