"""`python -m dwrl_fast.dialog --show FILE:N`: shows one row as the model reads it, and the changes that the chat
template makes.
"""

from dataclasses import dataclass, replace
from itertools import chain, groupby
from operator import itemgetter
from typing import ClassVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dwrl_fast.console import command, open_console
from dwrl_fast.data import Demonstration, Preference, Reader, open_rows
from dwrl_fast.dialog import Chat, Dialog, SingleTurn, Thinking
from dwrl_fast.dialog.chat import TODAY
from dwrl_fast.encode import demonstration_group
from dwrl_fast.errors import ConfigError
from dwrl_fast.models.pretrained import load_chat
from dwrl_fast.options import Options, at_least, option, parse

# ruff: noqa: RUF009 - what option() returns is a dataclass field

SAMPLE = "It is right, and says no more than it has to."  # shown in place of a sampled thought
VERDICT = {"pairwise": "<answer>[[A]]</answer>", "rationalizer": "<answer>[[A]]</answer>", "pointwise": "<s>9</s>"}
UNSEEN = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}  # control characters
STYLES = {
    "prompt": "blue",
    "response": "green",
    "second response": "yellow",
    "evaluate": "magenta",
    "thought (a sample)": "bold cyan",
    "thought": "bold cyan",
    "rate": "red",
    "head": "bold white",
    "chat template": "dim",
}


@dataclass(frozen=True, kw_only=True)
class ShowConfig(Options):
    """The options of `python -m dwrl_fast.dialog`."""

    command: ClassVar[str] = "python -m dwrl_fast.dialog"
    summary: ClassVar[str] = (
        "Shows one row of a data file as the model reads it: the conversation after the template and the chat template"
        " were applied, its token ids and their spans, and changes to its texts. Needs a tokenizer and no weights."
    )
    groups: ClassVar[tuple[str, ...]] = ("Row", "Model", "Template")
    examples: ClassVar[str] = """
# line 12 of a file, its preferred response
python -m dwrl_fast.dialog --show pairs.jsonl:12 --tokenizer_name_or_path Qwen/Qwen2.5-3B-Instruct

# the other response, under another aspect, as a model trained here reads it
python -m dwrl_fast.dialog --show pairs.jsonl:12 --response 2 --model_name_or_path runs/mine/model --aspect honesty

# both responses in one prompt, and your own template
python -m dwrl_fast.dialog --show pairs.jsonl:12 --tokenizer_name_or_path T --template pairwise
python -m dwrl_fast.dialog --show pairs.jsonl:12 --tokenizer_name_or_path T --template mine.yaml
"""

    show: str = option(
        help="FILE:N, a data file of any format and the number of a line, from 1. Other lines are not read.",
        group="Row",
    )
    response: int = option(1, "Which response: 1 is the best one of the row.", group="Row", bound=at_least(1))
    columns: dict[str, str] = option({}, "Rename columns, new=old, as for training.", group="Row")
    layout: str | None = option(None, "The layout of the file, as for training.", group="Row")
    max_length: int = option(
        4096,
        "As for training, where rows with a longer prompt and response are dropped. Here they are shown.",
        group="Row",
        bound=at_least(1),
    )
    model_name_or_path: str | None = option(
        None,
        "A model's folder, hub name or FILE.gguf. A model trained with this package has its own template and aspect.",
        group="Model",
    )
    tokenizer_name_or_path: str | None = option(
        None, "The tokenizer, if it is not in the model's folder.", group="Model"
    )
    template: str | None = option(
        None, "A packaged template, by name, or a YAML file. none: the model's own, or dialog.", group="Template"
    )
    aspect: str | None = option(
        None,
        "The criterion for judging. none: the aspect of the row, or of the model, or helpfulness.",
        group="Template",
    )
    enable_thinking: Thinking = option("auto", "As for training.", group="Template")

    def validate(self) -> None:
        """Raises ConfigError if no tokenizer is given, or if `show` is not FILE:N."""
        if self.model_name_or_path is None and self.tokenizer_name_or_path is None:
            raise ConfigError("give --model_name_or_path or --tokenizer_name_or_path: token ids need a tokenizer")
        if not self.show.rpartition(":")[2].isascii() or not self.show.rpartition(":")[2].isdigit():
            raise ConfigError(f"show = {self.show}: expected FILE:N, as in pairs.jsonl:12")


def main(argv: list[str]) -> None:
    """The command."""
    console = open_console(highlight=False)
    run(parse(ShowConfig, argv), console)


def run(config: ShowConfig, console: Console) -> None:
    """Print the row."""
    tokenizer = config.tokenizer_name_or_path or config.model_name_or_path
    assert tokenizer is not None  # checked by validate()
    chat = load_chat(
        config.model_name_or_path,
        tokenizer,
        template=config.template,
        aspect=config.aspect,
        enable_thinking=config.enable_thinking,
    )
    row = read_row(config, chat.named_aspect)
    if config.response > len(row.responses):
        raise ConfigError(f"response = {config.response}: the row has {len(row.responses)} responses")
    aspect = row.aspect if config.aspect is None else config.aspect
    ids, spans, length = build(chat, row, config.response - 1, aspect)
    names = named(len(ids), spans)
    verdict = f"   verdict {row.verdict or 'in the thought'}" if isinstance(row, Demonstration) else ""
    console.print(f"{config.show}   {chat.name}   template of kind {chat.template.kind}{verdict}", soft_wrap=True)
    console.print(Text("  ").join(Text(name, style) for name, style in STYLES.items() if name in names))
    console.rule("conversation")
    console.print(painted(runs(ids, names), chat), soft_wrap=True)
    console.rule("ids")
    console.print(Text(" ").join(Text(" ".join(map(str, part)), STYLES[name]) for name, part in runs(ids, names)))
    console.print(table(spans))
    console.rule("changes and remarks")
    for line in remarks(chat, ids, length, config.max_length):
        console.print(f"- {line}", markup=False, soft_wrap=True)


def read_row(config: ShowConfig, aspect: str | None) -> Preference:
    """The row on the requested line, with all its responses, best first. aspect: the aspect to judge, if a layout has
    scores by aspect. Raises DataError, with the reason, if the line has no usable row.
    """
    path, _, number = config.show.rpartition(":")
    # Every ranking can be read as pairs. The pairs contain its responses in order, without repeated ones.
    reader = Reader(
        open_rows(path),
        columns=config.columns,
        ties="keep",
        rankings="pairs",
        consecutive=True,
        layout=config.layout,
        aspect=aspect,
    )
    groups = reader.groups_of(int(number))
    if isinstance(groups[0], Demonstration):
        return groups[0]
    return replace(groups[0], responses=tuple(dict.fromkeys(chain(*(group.responses for group in groups)))))


def build(chat: Chat, row: Preference, response: int, aspect: str | None) -> tuple[list[int], dict[str, slice], int]:
    """The ids, their named spans, and the number of ids of prompt and responses."""
    assert isinstance(chat, Dialog | SingleTurn)
    name, thought = "thought (a sample)", _sample(chat)
    if isinstance(row, Demonstration):
        (sequence,) = demonstration_group(row, chat).flat
        name, thought = "thought", sequence.ids[sequence.thought]
    if isinstance(chat, Dialog):
        context = chat.context(row.prompt, row.responses[response], aspect)
        sequence = chat.sequence(context, thought)
        ends = {"rate": sequence.rate, "head": slice(sequence.rate.stop, len(sequence.ids))}
    else:
        shown = [row.responses[response]] if len(chat.shows) == 1 else list(row.responses[:2])
        if len(shown) < len(chat.shows):
            raise ConfigError(
                f"a template of kind {chat.template.kind} shows two responses, but the row has one; use a template "
                "that shows one: --template dialog"
            )
        context = chat.context(row.prompt, shown, aspect, "A" if chat.takes_verdict else None)
        sequence = chat.sequence(context, [] if chat.label_ids else thought)
        ends = {"head": slice(context.evaluate.stop, len(context.ids))}
    second = {} if context.second is None else {"second response": context.second}
    spans = {"prompt": context.prompt, "evaluate": context.evaluate, "response": context.response, **second}
    return sequence.ids, spans | {name: sequence.thought, **ends}, (context.second or context.response).stop


def _sample(chat: Chat) -> list[int]:
    """A sample thought, with a verdict if the template needs one."""
    text = " ".join([SAMPLE, *filter(None, [VERDICT.get(chat.template.kind)])])
    return [*chat.tokenizer.encode(text, add_special_tokens=False), chat.end_id]


def named(length: int, spans: dict[str, slice]) -> list[str]:
    """The name of each id; if two spans contain it, that of the later one."""
    names = ["chat template"] * length
    for name, span in spans.items():
        names[span] = [name] * (span.stop - span.start)
    return names


def runs(ids: list[int], names: list[str]) -> list[tuple[str, list[int]]]:
    """Runs of adjacent ids with the same name."""
    named_ids = groupby(zip(names, ids, strict=True), itemgetter(0))
    return [(name, [token for _, token in some]) for name, some in named_ids]


def painted(parts: list[tuple[str, list[int]]], chat: Chat) -> Text:
    """The text of the ids, in the colour of each part's name."""
    texts = (str(chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for _, ids in parts)
    return Text.assemble(
        *((text.translate(UNSEEN), STYLES[name]) for text, (name, _) in zip(texts, parts, strict=True))
    )


def table(spans: dict[str, slice]) -> Table:
    """The non-empty spans in the order of the text."""
    lines = Table("span", "from", "to", "ids", box=None)
    for name, span in sorted(spans.items(), key=lambda item: item[1].start):
        if span.stop > span.start:
            lines.add_row(Text(name, STYLES[name]), str(span.start), str(span.stop - 1), str(span.stop - span.start))
    return lines


def remarks(chat: Chat, ids: list[int], length: int, max_length: int) -> list[str]:
    """Sentences about what the chat template and the tokenizer did to the row."""
    bos = chat.tokenizer.bos_token_id
    done = [f"{what}: {MEANING[what]}" for what in chat.counts]
    over = f", more than --max_length {max_length}: training drops this row" if length > max_length else ""
    said = (
        *(done or ["the texts are unchanged: nothing trimmed, merged, rewritten or forged"]),
        "BOS: this tokenizer has none" if bos is None else f"BOS: {ids.count(int(bos))} of id {bos}",
        f"the date that the chat template prints is fixed at {TODAY:%d %b %Y}" if chat.dated else "",
        f"thinking: {chat.thinking_said}" if chat.thinking_said else "",
        f"prompt and response: {length} tokens{over}",
    )
    return [each for each in said if each]


MEANING = {
    "trimmed": "the chat template strips white space from a text, and this package does the same",
    "reasoning kept": "the chat template would remove a think block from an earlier turn; it is kept",
    "rewritten": "the chat template changes a text in another way; the text is kept unchanged",
    "control text": "a text spells a control token; it is encoded as ordinary text",
    "merged": "in one pass the tokenizer would merge a text with its neighbour; here each text is tokenized alone",
    "imitated": "a text contains a line that belongs to the template",
}


if __name__ == "__main__":
    command(main)
