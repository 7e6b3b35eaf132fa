"""From demonstrations to groups: one sequence each, with thought and verdict as trained tokens."""

from collections.abc import Callable

from dwrl_fast.data import Demonstration
from dwrl_fast.dialog import Dialog, SingleTurn, read_choice, read_score, write_choice, write_score
from dwrl_fast.encode.group import Group
from dwrl_fast.errors import TemplateError

Forms = dict[str, tuple[Callable[[str], str], Callable[[str], object]]]
FORMS: Forms = {"pairwise": (write_choice, read_choice), "pointwise": (write_score, read_score)}


def demonstration_group(row: Demonstration, dialog: Dialog | SingleTurn) -> Group:
    """The group of a demonstration. The trained span holds the thought and the verdict. If the template has labels, the
    verdict is in `labels` instead.

    Raises TemplateError if the template shows a different number of responses, or does not know the verdict.
    """
    kind, labels = dialog.template.kind, dialog.template.labels
    shows = 1 if isinstance(dialog, Dialog) else len(dialog.shows)
    if len(row.responses) != shows:
        raise TemplateError(f"not {shows} responses, the number that a template of kind {kind} shows")
    if labels is not None and row.verdict not in labels:
        raise TemplateError(f"the verdict is not one of the template's labels, {' and '.join(labels)}")
    if labels is not None and isinstance(dialog, SingleTurn) and row.thought.strip():
        raise TemplateError(f"the row has a thought, but a template of kind {kind} has none")
    if isinstance(dialog, Dialog):
        context = dialog.context(row.prompt, row.responses[0], row.aspect)
    else:
        context = dialog.context(row.prompt, row.responses, row.aspect)
    if labels is None:
        ids = dialog.thought_ids(_with_verdict(row.thought, row.verdict, kind))
        return Group(row, [[dialog.sequence(context, ids)]])
    ids = dialog.thought_ids(row.thought) if isinstance(dialog, Dialog) else []
    return Group(row, [[dialog.sequence(context, ids)]], labels=[labels.index(row.verdict)])


def _with_verdict(thought: str, verdict: str, kind: str) -> str:
    """The thought, followed by a line with the verdict in the form that the parser reads."""
    write, read = FORMS[kind]
    if not verdict:
        if read(thought) is None:
            raise TemplateError("no verdict, neither as a column nor at the end of the thought")
        return thought
    form = write(verdict)
    if read(form) is None:
        raise TemplateError(f"the verdict is not one that a template of kind {kind} asks for")
    return f"{thought}\n{form}" if thought else form
