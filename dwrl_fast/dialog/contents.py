"""Encodes text from people and models so that it cannot produce control tokens."""

import functools
import json
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dwrl_fast.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HIDDEN = secrets.token_hex(16)  # prefix of renamed control tokens; no text can contain it


class ContentTokenizer:
    """Two copies of a fast tokenizer's backend: `whole` uses the unchanged one; calling this object uses the one in
    which every control token is renamed.

    Every added token counts as a control token, unless it consists of white space or is the unknown token: Qwen's
    `<tool_call>` is not marked "special" but is structure. Both copies give the same ids for ordinary text. Truncation
    or padding that is set on the tokenizer elsewhere does not affect the copies.
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
        """The ids of a content. The last 512 results are cached, because responses share the turns of their prompt."""
        return self._encode(content)

    def offsets(self, content: str) -> list[tuple[int, int]]:
        """The position of each id in a content, in characters."""
        return self._split.encode(content, add_special_tokens=False).offsets

    def whole(self, rendered: str) -> list[int]:
        """The ids of rendered text: control tokens are parsed, and no special tokens are added."""
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
    """Rename control tokens in the vocabulary, where they can also be words (word-level, SentencePiece). Ids stay the
    same.
    """
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[HIDDEN + piece if piece in control else piece, score] for piece, score in vocab]
    elif not control.isdisjoint(vocab):
        model["vocab"] = {HIDDEN + word if word in control else word: i for word, i in vocab.items()}
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if control.isdisjoint((*pair, "".join(pair)))]
