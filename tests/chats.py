"""Tokenizers and chat templates for the tests of the dialog: synthetic ones, and the two real ones."""

import functools
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dwrl_fast.data import Message
from dwrl_fast.dialog import Template
from dwrl_fast.dialog.contents import ContentTokenizer

TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for message in messages %}" + TURN + "{% endfor %}" + HEAD
TRIMMING = CHATML.replace("message.content", "message.content | trim")
CONTROL = ["<|im_start|>", "<|im_end|>", "<|eos|>"]
WORDS = ("user assistant system Yes No Now is the answer good", "? . hello there what why five six")
LETTERS = Template("is it good?", "rate it {aspect}", ("Y", "N"))
TEMPLATE = Template("what is good ? {aspect}", "is the answer good ? {aspect}")
PROMPT: list[Message] = [{"role": "user", "content": "what is five ?"}]
LONG: list[Message] = [
    {"role": "system", "content": "the answer is six ."},
    *PROMPT,
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "why ?"},
]


def word_level(chat_template: str | None = CHATML, *, eos: str = "<|im_end|>", pad: bool = False) -> Any:
    """The hard case: control tokens are words of the vocabulary, and text is split at blanks only."""
    vocab = {word: i for i, word in enumerate(["<unk>", *CONTROL, *" ".join(WORDS).split()])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", *CONTROL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token=eos, pad_token="<|eos|>" if pad else None
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def merging(*merges: str) -> Any:
    """Characters, and the merges given: each is two characters that become one token, across turns' borders too."""
    text = "".join(map(chr, range(32, 127))) + "\n"
    vocab = {token: i for i, token in enumerate([*text, *merges])}
    backend = Tokenizer(models.BPE(vocab, [(merge[0], merge[1]) for merge in merges]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def messages(prompt: list[Message], response: str, *later: str) -> list[Message]:
    roles = ("assistant", "user", "assistant", "user")
    turns: list[Message] = [{"role": r, "content": text} for r, text in zip(roles, (response, *later), strict=False)]
    return prompt + turns


def applied(tokenizer: PreTrainedTokenizerBase, turns: list[Message], head: bool = True) -> list[int]:
    return tokenizer.apply_chat_template(turns, add_generation_prompt=head, return_dict=False)  # type: ignore[arg-type,return-value]


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


contents_of = functools.cache(ContentTokenizer)
"""In place of ContentTokenizer where many dialogs are made of one real tokenizer, whose vocabulary takes seconds."""


@functools.cache
def real_tokenizer(shared: Path, name: str, chat_template: str | None = None, *added: str) -> Any:
    """One of the real tokenizers, with another chat template and the control tokens that go with it."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    return tokenizer
