"""Text that people and models wrote, as ids: control tokens cannot arise from it."""

import functools
import json
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dwrl_fast.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HIDDEN = secrets.token_hex(16)  # stands before a control token's name where text is encoded: no text can spell it


class ContentTokenizer:
    """A fast tokenizer's backend, twice: `whole` as it is, and, called, with every control token renamed.

    Every added token is a control token unless it is made of blanks or stands for the unknown word: Qwen's
    `<tool_call>` is not "special" and yet structure. Ids of ordinary text are the same in both. Both are copies:
    truncation or padding that is set on the tokenizer elsewhere does not reach them.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None
        self._whole = Tokenizer.from_str(json.dumps(state))
        unknown = _unknown(state["model"])
        control = [t for t in state["added_tokens"] if t["content"] != unknown and not _blank(t["content"])]
        self.control = frozenset(token["id"] for token in control)
        _hide(state["model"], {token["content"] for token in control})
        for token in control:
            token["content"] = HIDDEN + token["content"]
        self._split = Tokenizer.from_str(json.dumps(state))
        self._encode = functools.lru_cache(maxsize=512)(self._encode_content)

    def __call__(self, content: str) -> tuple[int, ...]:
        """The ids of a content. The last 512 are remembered: responses share their prompt's turns."""
        return self._encode(content)

    def offsets(self, content: str) -> list[tuple[int, int]]:
        """Where in a content each of its ids stands, in characters."""
        return self._split.encode(content, add_special_tokens=False).offsets

    def whole(self, rendered: str) -> list[int]:
        """The ids of rendered text, control tokens parsed, nothing added."""
        return self._whole.encode(rendered, add_special_tokens=False).ids

    def count_control(self, ids: Iterable[int]) -> int:
        """How many of `ids` are control tokens."""
        return sum(i in self.control for i in ids)

    def _encode_content(self, content: str) -> tuple[int, ...]:
        ids = tuple(self._split.encode(content, add_special_tokens=False).ids)
        if not self.control.isdisjoint(ids):
            names = [self._whole.id_to_token(i) for i in ids if i in self.control]
            raise TemplateError(
                f"the tokenizer encodes a text that spells {names} as control tokens; use another tokenizer"
            )
        return ids


def _blank(content: str) -> bool:
    return not content.replace("▁", " ").strip()


def _unknown(model: dict[str, Any]) -> str | None:
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _hide(model: dict[str, Any], control: set[str]) -> None:
    """Control tokens can be words of the vocabulary too (word-level, SentencePiece): rename them there; ids stay."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[HIDDEN + piece if piece in control else piece, score] for piece, score in vocab]
    elif not control.isdisjoint(vocab):
        model["vocab"] = {HIDDEN + word if word in control else word: i for word, i in vocab.items()}
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if control.isdisjoint((*pair, "".join(pair)))]
