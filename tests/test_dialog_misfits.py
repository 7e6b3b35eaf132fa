"""Chat templates, tokenizers and labels that do not fit a dialog are refused, with their names."""

import pytest
from chats import CHATML, LETTERS, LONG, TEMPLATE, TURN, encoded, merging, word_level

from dwrl_fast.dialog import Dialog, Template
from dwrl_fast.errors import TemplateError

CONTENT = "{{ message.content }}"
ASSISTANT = "{% if message.role == 'assistant' %}"
LAST = "{% if loop.last and message.role == 'assistant' %}"
WRONG_TEMPLATES = {
    "no chat template": (None, "no chat template.*--tokenizer_name_or_path"),
    "upper case": (CHATML.replace("message.content", "message.content | upper"), "rewrites a 'user' turn"),
    "other words": (
        CHATML.replace("message.content", "message.content | replace('is', 'was')"),
        "rewrites a plain turn",
    ),
    "refuses a role": (
        CHATML.replace(TURN, ASSISTANT + "{{ raise_exception('users only') }}{% endif %}" + TURN),
        r"refuses the roles \(user, assistant.*users only",
    ),
    "drops a turn": (
        CHATML.replace(TURN, "{% if loop.first %}" + TURN + "{% endif %}"),
        "drops, moves or rewrites a 'assis",
    ),
    "repeats a turn": (CHATML + "{{ messages[0].content }}", "repeats, .* a 'user' turn"),
    "other last words": (
        CHATML.replace(
            CONTENT, LAST + CONTENT.replace("}}", "| replace('is', 'was') }}{% else %}") + CONTENT + "{% endif %}"
        ),
        "rewrites a plain turn",
    ),
    "think block": (
        CHATML.replace("assistant\n{% endif", "assistant\nwhy {% endif"),
        "may add only a think block to that",
    ),
    "marks long dialogs": ("{% if messages | length > 3 %}why {% endif %}" + CHATML, "differently once others follow"),
    "no end of turn": (CHATML.replace("<|im_end|>", " . "), "control token, so its end cannot be told"),
    "ends twice": (
        CHATML.replace("<|im_end|>", LAST + " .{% else %}<|im_end|>{% endif %}"),
        "ends the last assistant turn differently",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_TEMPLATES)
def test_templates_that_do_not_fit_are_named(wrong: str) -> None:
    chat_template, message = WRONG_TEMPLATES[wrong]
    with pytest.raises(TemplateError, match=message) as error:
        Dialog(word_level(chat_template), TEMPLATE)
    assert "TokenizersBackend" in str(error.value) or "PreTrainedTokenizerFast" in str(error.value)


def test_a_refused_role_is_named_where_it_occurs() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    dialog = Dialog(word_level(refusing), TEMPLATE)
    with pytest.raises(TemplateError, match=r"refuses the roles \(system, user.*no system role"):
        dialog.context(LONG, "five")


def test_a_tail_that_depends_on_the_prompt_is_refused() -> None:
    mark = "{{ 'why ' if messages[0].role == 'system' else '' }}"
    tokenizer = word_level(CHATML.replace(CONTENT, mark + CONTENT).replace("assistant\n", "assistant\n" + mark))
    dialog = Dialog(tokenizer, TEMPLATE)
    with pytest.raises(TemplateError, match="roles system, user, assistant, user"):
        dialog.context(LONG, "five")


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False
        name_or_path = "old"

    with pytest.raises(TemplateError, match="Slow old is a slow tokenizer"):
        Dialog(Slow())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("Yes", "No way"), "label 'No way' one token.*No"),
        (("Yes", "Maybe"), "does not know the label 'Maybe'"),
        (("Yes", "Yes"), "both labels"),
        (("<|im_end|>", "No"), r"label '<\|im_end\|>' one token"),
    ],
)
def test_labels_that_are_not_one_token(labels: tuple[str, str], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        Dialog(word_level(), Template(TEMPLATE.evaluate, TEMPLATE.rate, labels))


def test_a_label_that_merges_with_the_head() -> None:
    assert Dialog(merging("NY"), LETTERS).yes_id == encoded(merging(), "Y")[0]
    with pytest.raises(TemplateError, match="label 'Y' one token"):
        Dialog(merging("\nY"), LETTERS)


def test_a_fixed_turn_that_merges_is_named() -> None:
    with pytest.raises(TemplateError, match=r"merges it with the text next to it, at token \d+"):
        Dialog(merging("\n\n"), Template("\nis it good?"))
