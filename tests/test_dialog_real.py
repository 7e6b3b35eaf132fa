"""The dialog with the two real tokenizers (Qwen2.5, Llama 3) on real rows, all from the shared folder."""

import gzip
import json
import unicodedata
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from chats import PROMPT, TEMPLATE, applied, encoded, messages, real_tokenizer, word_level

from dwrl_fast.dialog import Dialog
from dwrl_fast.errors import TemplateError

REAL = ("qwen2.5", "llama3")
_loaded: dict[str, tuple[Any, Dialog]] = {}


@pytest.fixture(params=REAL)
def real(request: pytest.FixtureRequest, shared: Path) -> tuple[Any, Dialog]:
    """A real tokenizer and its dialog, created once."""
    if request.param not in _loaded:
        tokenizer = real_tokenizer(shared, request.param)
        _loaded[request.param] = tokenizer, Dialog(tokenizer)
    tokenizer, dialog = _loaded[request.param]
    dialog.counts.clear()
    return tokenizer, dialog


def filled(dialog: Dialog) -> tuple[str, str]:
    evaluate, rate = dialog.template.evaluate, dialog.template.rate
    return evaluate.replace("{aspect}", dialog.aspect), rate.replace("{aspect}", dialog.aspect)


CLEAN = (
    *("hh/hh_train", "hh/hh_test", "rmb/rmb_helpful_train", "rmb/rmb_helpful_test"),
    *("math/gsm8k_real_train", "math/gsm8k_real_test", "math/gsm8k_corrupt_train", "math/gsm8k_corrupt_test"),
    *("if/llmbar", "if/ultrafeedback_train", "if/ultrafeedback_test", "graded/rmb_bon_helpful"),
    *("graded/webgpt_magnitude", "graded/qa_feedback_rank4", "graded/arena_bench_rank7", "graded/arena_bench_likert15"),
)


def check_rows(tokenizer: Any, dialog: Dialog, path: Path, limit: int) -> Counter[str]:
    """Compare our ids with the tokenizer's for a response of each row. Returns the number of different rows, by
    counter.
    """
    evaluate, rate = filled(dialog)
    differing: Counter[str] = Counter()
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in islice(file, limit)]
    assert len(rows) > 0
    for number, row in enumerate(rows):
        responses = row.get("responses") or [row["chosen"][0]["content"], row["rejected"][0]["content"]]
        response = responses[number % len(responses)]
        dialog.counts.clear()
        context = dialog.context(row["prompt"], response)
        sequence = dialog.sequence(context, encoded(tokenizer, "A fair answer."))
        turns = messages(row["prompt"], response, evaluate, "A fair answer.", rate)
        theirs = applied(tokenizer, turns)
        reasons = dialog.counts.keys() - {"trimmed"}
        assert (sequence.ids == theirs) == (not reasons), (path, number, dialog.counts)
        shown = tokenizer.decode(context.ids[context.response])
        composed = unicodedata.normalize("NFC", response)  # Qwen's tokenizer composes characters
        assert shown in (response, composed) or dialog.counts["trimmed"]
        if reasons == {"merged"}:
            assert tokenizer.decode(sequence.ids) == tokenizer.decode(theirs), "the same text in other pieces"
        differing.update(reasons)
    return differing


@pytest.mark.parametrize("name", CLEAN)
def test_real_rows_have_the_templates_ids_or_are_counted(real: tuple[Any, Dialog], shared: Path, name: str) -> None:
    assert check_rows(*real, shared / f"{name}.jsonl.gz", 100).keys() <= {"merged"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLEAN)
def test_a_thousand_rows_have_the_templates_ids_or_are_counted(
    real: tuple[Any, Dialog], shared: Path, name: str
) -> None:
    differing = check_rows(*real, shared / f"{name}.jsonl.gz", 1000)
    print(f"{real[1].name} {name}: {dict(differing) or 'all equal'}")
    assert differing.keys() <= {"merged"}


def test_real_tokenizers_as_known(real: tuple[Any, Dialog]) -> None:
    tokenizer, dialog = real
    context = dialog.context(PROMPT, "\n Six. \n")
    counted = dict(dialog.counts)
    if tokenizer.bos_token is None:
        assert (dialog.yes_id, dialog.no_id, dialog.end_id, dialog.pad_id) == (9454, 2753, 151645, 151643)
        assert counted == {"merged": 1}
        assert tokenizer.decode(context.ids[context.response]) == "\n Six. \n"
    else:
        assert (dialog.yes_id, dialog.no_id, dialog.end_id, dialog.pad_id) == (9642, 2822, 128009, 128255)
        assert counted == {"trimmed": 1}
        assert tokenizer.decode(context.ids[context.response]) == "Six."
        assert [i for i, token in enumerate(context.ids) if token == tokenizer.bos_token_id] == [0]
        assert "Today Date: 26 Jul 2024" in tokenizer.decode(context.ids)


def test_real_thoughts_are_not_re_encoded(real: tuple[Any, Dialog]) -> None:
    tokenizer, dialog = real
    ids = [i for part in ("Th", "e ans", "wer", "\n", "\n") for i in encoded(tokenizer, part)]
    assert encoded(tokenizer, tokenizer.decode(ids)) != ids
    sequence = dialog.sequence(dialog.context(PROMPT, "Six."), ids)
    assert sequence.ids[sequence.thought] == ids
    assert sequence.ids[sequence.thought.stop] == dialog.end_id
    assert tokenizer.decode(sequence.ids[sequence.rate]) == filled(dialog)[1]


def test_saved_dialogs_know_their_tokenizer(shared: Path, real: tuple[Any, Dialog]) -> None:
    _, dialog = real
    with pytest.raises(TemplateError, match="is not the tokenizer this model was trained with"):
        Dialog.from_dict(
            word_level(), dialog.to_dict() | {"template": Dialog(word_level(), TEMPLATE).to_dict()["template"]}
        )
