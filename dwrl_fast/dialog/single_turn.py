"""Single-turn judging as token ids: one user turn that shows the prompt and its responses, and the answer to it.

The answer is a thought that ends with a verdict (kinds pairwise, pointwise, rationalizer; see verdict.py) or a label
read at once (direct). The content of the turn is plain text. A response can imitate the words around it, which is
counted, but it cannot produce a control token or a placeholder of the template.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dwrl_fast.data import Message
from dwrl_fast.dialog.chat import Chat, Thinking, user
from dwrl_fast.dialog.sequence import Context, TokenSequence
from dwrl_fast.templates import KINDS, PLACE, Template, fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CANONICAL: tuple[Message, ...] = (user("What is two plus three?"),)


class SingleTurn(Chat):
    """Builds the sequences for sampling, training and scoring, for one tokenizer, template and aspect.

    In addition to those of Chat, `counts` has "imitated": a content contains a line of the template. `label_ids` are
    the ids of the labels, in the order of the responses, if the template has labels. Raises TemplateError like Chat.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: Template,
        aspect: str | None = None,
        enable_thinking: Thinking = "auto",
    ) -> None:
        super().__init__(tokenizer, template, aspect, enable_thinking)
        self.shows = tuple(name for name in KINDS[template.kind].texts["evaluate"] if name.startswith("response"))
        self._lines = {line for line in _lines(template.evaluate) if not PLACE.search(line)}
        canonical = CANONICAL, ["Five.", "Six."][: len(self.shows)]
        verdict = "A" if self.takes_verdict else None
        text, _ = self._fill(*canonical, None, verdict)
        self._check_equal(
            self.context(*canonical, verdict=verdict).ids,
            self._tokenized([user(text)], "label" if template.labels else "thought"),
        )
        self.label_ids = None if template.labels is None else self._label_ids(template.labels, [user(text)])
        self.counts.clear()

    @property
    def takes_verdict(self) -> bool:
        """Whether the template contains the verdict, as a rationalizer template does."""
        return "verdict" in KINDS[self.template.kind].texts["evaluate"]

    def context(
        self, prompt: Sequence[Message], responses: Sequence[str], aspect: str | None = None, verdict: str | None = None
    ) -> Context:
        """The turn that shows `responses` (as many as the template's kind shows, in this order), and the head.

        verdict: "A" or "B", for a template that contains it.
        """
        text, places = self._fill(prompt, responses, aspect, verdict)
        if any(not self._lines.isdisjoint(_lines(content)) for content in (*responses, transcript(prompt))):
            self.counts["imitated"] += 1
        ids, (turn,), (shown,) = self._build([user(text)], "label" if self.template.labels else "thought")
        trimmed = 0 if shown == text else len(text) - len(text.lstrip())
        offsets = self._contents.offsets(shown)
        spans = []
        for name in self.shows:
            start, stop = places[name].start - trimmed, places[name].stop - trimmed
            first = next((i for i, (_, end) in enumerate(offsets) if end > start), len(offsets))
            last = next((i for i in range(len(offsets), first, -1) if offsets[i - 1][0] < stop), first)
            spans.append(slice(turn.start + first, turn.start + last))
        second = spans[1] if len(spans) > 1 else None
        return Context(ids, slice(0, spans[0].start), spans[0], turn, second, aspect)

    def sequence(self, context: Context, thought_ids: Sequence[int]) -> TokenSequence:
        """`context` and the sampled thought, all of it in the span `thought`; `rate` is empty."""
        ids = [*context.ids, *thought_ids]
        return TokenSequence(
            ids, context.prompt, context.response, slice(len(context.ids), len(ids)), slice(len(ids), len(ids))
        )

    def special_ids(self) -> dict[str, int]:
        """What a saved model's tokenizer must agree on."""
        labels = {} if self.label_ids is None else dict(zip(("first_id", "second_id"), self.label_ids, strict=True))
        return labels | {"end_id": self.end_id}

    def _fill(
        self, prompt: Sequence[Message], responses: Sequence[str], aspect: str | None, verdict: str | None
    ) -> tuple[str, dict[str, slice]]:
        contents = {"aspect": self.aspect if aspect is None else aspect, "prompt": transcript(prompt)}
        contents |= dict(zip(self.shows, responses, strict=True)) | ({} if verdict is None else {"verdict": verdict})
        return fill(self.template.evaluate, contents)


def transcript(prompt: Sequence[Message]) -> str:
    """A prompt as text: a single user turn unchanged, several turns with their roles."""
    if [message["role"] for message in prompt] == ["user"]:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def _lines(text: str) -> set[str]:
    return {stripped for line in text.split("\n") if (stripped := line.strip())}
