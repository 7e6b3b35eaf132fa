"""Checks of the tokenizer and its chat template. `Chat` and `Dialog` already refuse most faults in their constructors;
these checks cover what they accept.
"""

from collections.abc import Iterator

from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.dialog.chat import user
from dwrl_fast.doctor.finding import Finding

OTHER_TEMPLATE = (
    "Give the tokenizer of an instruction-tuned model (--tokenizer_name_or_path), or another chat template: the file "
    "chat_template.jinja in the tokenizer's folder, or chat_template in its tokenizer_config.json."
)
OTHER_LABELS = (
    'Copy dwrl_fast/templates/dialog.yaml, give it labels that are one token each, such as ["Yes", "No"], and name '
    "the file with --template."
)
CANONICAL = (user("What is two plus three?"),)


def chat_template(dialog: Dialog | SingleTurn) -> Finding:
    """Pass: a dialog can only be made from a chat template that keeps earlier turns unchanged when turns follow."""
    said = f"{dialog.name}: earlier turns stay unchanged when turns follow; a thought ends with "
    said += _token(dialog, dialog.end_id)
    return Finding("chat template", "pass", said + (f"; {dialog.thinking_said}" if dialog.thinking_said else ""))


def labels(dialog: Dialog | SingleTurn) -> Iterator[Finding]:
    """The labels and their ids, if the template has labels."""
    if dialog.template.labels is not None and dialog.label_ids is not None:
        pairs = zip(dialog.template.labels, dialog.label_ids, strict=True)
        yield Finding("labels", "pass", "one token each: " + ", ".join(f"{label!r} is {i}" for label, i in pairs))


def bos(dialog: Dialog | SingleTurn) -> Finding:
    """How often the BOS token occurs at the beginning of a conversation."""
    tokenizer = dialog.tokenizer
    if tokenizer.bos_token_id is None:
        return Finding("BOS", "pass", "the tokenizer has none")
    token, ids = tokenizer.bos_token_id, dialog.completion(CANONICAL, "It is five.").ids
    count = next((i for i, each in enumerate(ids) if each != token), len(ids))
    name = _token(dialog, token)
    if count > 1:
        return Finding(
            "BOS",
            "fail",
            f"{name} occurs {count} times at the beginning of every conversation, but models are trained with one",
            "Remove all but one from the chat template: the file chat_template.jinja in the tokenizer's folder, or "
            "chat_template in its tokenizer_config.json.",
        )
    if count == 0 and tokenizer.encode("a")[:1] == [token]:
        return Finding(
            "BOS",
            "warn",
            f"the tokenizer puts {name} before a plain text, but the chat template puts none before a conversation",
            "Put {{ bos_token }} at the beginning of the chat template, unless the model was trained without it.",
        )
    said = f"{name} occurs once at the beginning" if count else f"conversations begin without {name}, as plain texts do"
    return Finding("BOS", "pass", said)


def padding(dialog: Dialog | SingleTurn, *, scalar: bool) -> Finding:
    """The pad token and the padding side of the tokenizer. They do not change results here, because this package pads
    and masks batches itself. But they are saved with the model, and other code may use them.
    """
    tokenizer = dialog.tokenizer
    given, side = tokenizer.pad_token_id, tokenizer.init_kwargs.get("padding_side")
    wanted = "right" if scalar else "left"
    if given is None:
        said = f"the tokenizer has no pad token; {_token(dialog, dialog.pad_id)} is used"
    elif given != dialog.pad_id:
        said = (
            f"the tokenizer's pad token {_token(dialog, given)} also ends turns; {_token(dialog, dialog.pad_id)} is "
            "used instead"
        )
    else:
        said = f"pad token {_token(dialog, given)}"
    said += f"; the tokenizer's padding side is {tokenizer.padding_side}" + ("" if side else " (not set)")
    if side is None or side == wanted:
        return Finding("padding", "pass", said + "; this package pads and masks batches regardless of it")
    use = "reads scores at the last token" if scalar else "generates in batches"
    return Finding(
        "padding",
        "warn",
        f"{said}; the tokenizer is saved with the model, and code that {use} with it needs the {wanted} side",
        f'Set "padding_side": "{wanted}" in tokenizer_config.json. Training with this package gives the same result '
        "either way.",
    )


def texts(dialog: Dialog | SingleTurn, rows: int) -> Finding:
    """The changes to the texts of `rows` rows when they were encoded (`Chat.counts`)."""
    counts = dict(dialog.counts)
    said = f"{rows} rows" + "".join(f"; {count} conversations {what}" for what, count in counts.items())
    if counts.get("rewritten"):
        return Finding(
            "texts",
            "warn",
            said + ": the chat template would change a text; the model reads the text as the row has it",
            "Look at a row with python -m dwrl_fast.dialog --show FILE:LINE; use another chat template if it matters.",
        )
    return Finding("texts", "pass", said)


def _token(dialog: Dialog | SingleTurn, token: int) -> str:
    return f"{dialog.tokenizer.convert_ids_to_tokens(token)} ({token})"
