"""Layouts with many answers: a list with ranks or scores, winners and losers, or one answer per row with scores."""

from typing import Any

from dwrl_fast.data.columns import Unusable
from dwrl_fast.data.formats import BINARY, BINARYMAGN, RANKING, SINGLE
from dwrl_fast.data.layouts.layout import Layout, Published, Values, found, listed, named, number
from dwrl_fast.data.layouts.pairs import CHOSEN, REJECTED, ours
from dwrl_fast.data.layouts.prompts import content, prompt
from dwrl_fast.data.messages import is_message
from dwrl_fast.data.remarks import OTHER_ASPECT
from dwrl_fast.data.table_text import parsed, truth
from dwrl_fast.errors import DataError

ANSWERS = "answers|candidates|completions|responses"
LISTS = f"{ANSWERS}|outputs|generations|options"
INDEX = "|".join(
    f"{best}_{place}" for best in ("chosen", "preferred", "best", "winner", "better") for place in ("index", "idx")
)
LABEL = "label|kto_tag"
GENERATIONS = "generations|completions|responses"
GRADED = f"completion|response|answer|messages|conversations {LABEL}"
TEXT = "response|answer|text|completion|content|output"
SCORE = "score|pm_score|overall_score|rating|reward"
ASPECTS = (
    "helpfulness", "correctness", "coherence", "complexity", "verbosity", "honesty", "truthfulness",
    "instruction_following", "harmlessness", "safety", "relevance", "clarity", "quality",
)  # fmt: skip
DEFAULT = "helpfulness"
OVERALL = "overall_score|fine-grained_score|score"
UNRATED = "responses left out: without a score"
OVERALL_READ = "rows read by their overall scores (--aspect NAME reads the ratings of one aspect)"


def rated(row: Published) -> dict[str, Any]:
    """UltraFeedback: completions with an overall score and ratings by aspect. All scores of a row are of one kind."""
    items = [_object(row, "completions", item) for item in listed(row, "completions", row.take("completions"))]
    ratings = [item["annotations"] if isinstance(item.get("annotations"), dict) else {} for item in items]
    row.aspects = tuple(dict.fromkeys(name for each in ratings for name, value in each.items() if value is not None))
    row.scored_by = aspect = named(row.aspects, row.asked)
    if aspect is not None:
        scores = [_rating(row, each.get(aspect)) for each in ratings]
    else:
        scores = [number(row, "overall_score", item.get(found(item, OVERALL) or "")) for item in items]
        if row.aspects:
            row.notes[OVERALL_READ if row.asked is None else OTHER_ASPECT] += 1
    return _ranking(row, [(item.get("response"), score) for item, score in zip(items, scores, strict=True)])


def answers(row: Published) -> dict[str, Any]:
    """A list of answers, each with a rank (1 the best) or a score."""
    name = row.name(ANSWERS) or "answers"
    items = [_object(row, name, item) for item in listed(row, name, row.take(ANSWERS))]
    texts = [item.get(found(item, TEXT) or "") for item in items]
    if all("rank" in item for item in items):
        ranks = [number(row, "rank", item["rank"]) for item in items]
        values = prompt(row) | {"responses": list(map(content, texts)), "ranks": ranks}
        return values | ours(row)
    if not any(found(item, SCORE) for item in items):
        raise row.wrong(name, items, f"objects with a rank or one of {SCORE.replace('|', ', ')}")
    scores = [number(row, "score", item.get(found(item, SCORE) or "")) for item in items]
    return _ranking(row, list(zip(texts, scores, strict=True)))


def generations(row: Published) -> dict[str, Any]:
    """A list of answers and a list of their ratings."""
    texts, ratings = (listed(row, name, row.take(name)) for name in (GENERATIONS, "ratings"))
    if len(texts) != len(ratings):
        raise Unusable("the numbers of ratings and answers differ")
    return _ranking(row, [(text, number(row, "ratings", each)) for text, each in zip(texts, ratings, strict=True)])


def several(row: Published) -> dict[str, Any]:
    """Lists of better and of worse answers; every better answer is compared with every worse one."""
    better, worse = (_texts(row.take(names)) for names in (CHOSEN, REJECTED))
    if not better or not worse:
        raise Unusable("no chosen or no rejected response")
    ranks = [1] * len(better) + [2] * len(worse)
    return prompt(row) | {"responses": [content(each) for each in better + worse], "ranks": ranks} | ours(row)


def picked(row: Published) -> dict[str, Any]:
    """A list of answers and the index of the best, from 0; it is better than each of the others."""
    name, texts = row.name(LISTS) or "", [_text(item) for item in listed(row, "responses", row.take(LISTS))]
    place = number(row, row.name(INDEX) or "", row.take(INDEX))
    if place is None:
        raise Unusable("null index of the best response")
    if place not in range(len(texts)):
        raise row.wrong(row.name(INDEX) or "", place, f"an index into {name}, 0 to {len(texts) - 1}")
    ranks = [1 if i == place else 2 for i in range(len(texts))]
    return prompt(row) | {"responses": [content(text) for text in texts], "ranks": ranks} | ours(row)


def _text(item: Any) -> Any:
    return item.get(found(item, TEXT) or "") if isinstance(item, dict) and not is_message(item) else item


def by_aspect(row: Published) -> dict[str, Any]:
    """One answer per row, with scores by aspect in columns."""
    row.aspects = tuple(name for name in ASPECTS if name in row.values)
    asked = DEFAULT if row.asked is None else row.asked
    name = named(row.values, asked)
    if name is None and row.aspects:
        raise DataError(
            f"{row.source}: the rows are read as {row.title}, and have no scores of {asked}; name the scores to take: "
            f"--aspect {' or '.join(row.aspects)}. To judge by {asked} all the same: --columns score={row.aspects[0]}, "
            "without --layout"
        )
    row.scored_by = name = name or asked
    score = number(row, name, row.take(name))
    return prompt(row) | {"completion": content(row.take("response|completion|answer")), "score": score} | ours(row)


def scored(row: Published) -> dict[str, Any]:
    """One answer per row, with a score under another name."""
    name = row.name(f"{SCORE}|label") or "score"
    score = number(row, name, row.take(f"{SCORE}|label"))
    return prompt(row) | {"completion": content(row.take("response|completion|answer")), "score": score} | ours(row)


def graded(row: Published) -> dict[str, Any]:
    """One answer per row, labelled true or false; the answer may be the last turn of a conversation."""
    label = row.take(LABEL)
    if truth(label) is None:
        raise row.wrong("label", label, "true or false")
    grade = {"score": float(truth(label) or 0)}
    name = row.name("completion|response|answer")
    if name is None:
        return {"completion": content(row.take("messages|conversations|conversation"))} | grade | ours(row)
    return prompt(row) | {"completion": content(row.get(name))} | grade | ours(row)


def _ranking(row: Published, scored: list[tuple[Any, float | None]]) -> dict[str, Any]:
    kept = [(text, score) for text, score in scored if score is not None]
    if len(kept) < len(scored):
        row.notes[UNRATED] += len(scored) - len(kept)
    return prompt(row) | {"responses": [content(text) for text, _ in kept], "scores": [s for _, s in kept]} | ours(row)


def _rating(row: Published, value: Any) -> float | None:
    return number(row, "Rating", value.get("Rating") if isinstance(value, dict) else value)


def _object(row: Published, name: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise row.wrong(name, item, "a list of objects")
    return item


def _texts(value: Any) -> list[Any]:
    value = parsed(value)
    return list(value) if isinstance(value, list) and not (value and is_message(value[0])) else [value]


def _completions(values: Values) -> bool:
    value = values["completions"]
    value = parsed(value)
    return isinstance(value, list) and all(isinstance(item, dict) and "response" in item for item in value)


def _answers(values: Values) -> bool:
    if found(values, f"chosen|rejected|{INDEX}"):
        return False
    name = found(values, ANSWERS)
    items = parsed(values[name]) if name else None
    if name not in ("completions", "responses"):
        return True
    # `completions` with rank and completion are this package's format, those with a response are UltraFeedback's.
    return isinstance(items, list) and all(
        isinstance(item, dict) and found(item, SCORE) and found(item, TEXT) and not item.keys() & {"rank", "response"}
        for item in items
    )


def _several(values: Values) -> bool:
    """Whether an answer column holds a list of texts or of conversations."""
    sides = [values.get(found(values, names) or "") for names in (CHOSEN, REJECTED)]
    sides = [parsed(side) for side in sides]
    return any(isinstance(side, list) and side and isinstance(side[0], str | list) for side in sides)


def _graded(values: Values) -> bool:
    label = values.get(found(values, LABEL) or "")
    return truth(label) is not None and not found(values, "chosen|rejected|score")


def _by_aspect(values: Values) -> bool:
    return not found(values, "score|thought|chosen|rejected") and any(name in values for name in ASPECTS)


MANY = (
    Layout(
        "ultrafeedback", "UltraFeedback completions", "completions",
        "`response` of each of the `completions`; its `overall_score`, or with `--aspect` the `Rating` of that "
        "aspect in its `annotations`, is its score; a row without such a rating is read by its overall scores, with a "
        "warning", rated, RANKING, when=_completions, over=(RANKING,),
        lost="rationales; completions without a score, which are counted",
    ),
    Layout(
        "answers", "answers with ranks or scores", ANSWERS,
        "`answers` of `answer` (or `text`) and `rank` (1 is the best), or `pm_score` (or `score`)", answers, RANKING,
        lost="`selected`", when=_answers, over=(RANKING,),
    ),
    Layout(
        "generations", "lists of answers and of ratings", f"{GENERATIONS} ratings",
        "`generations` are the responses, and `ratings` their scores", generations, RANKING,
        when=lambda values: not found(values, "chosen|rejected"), over=(RANKING,),
        lost="answers without a rating, which are counted",
    ),
    Layout(
        "picked", "lists of answers with the index of the best", f"{LISTS} {INDEX}",
        "the answer at `chosen_index` (or `preferred_index`, `best_index`, ...), counted from 0, is better than each "
        "of the others", picked, RANKING, lost="an order among the others",
        when=lambda values: not found(values, "chosen|rejected|ranks|scores|ratings"),
    ),
    Layout(
        "several", "several better and several worse answers", f"{CHOSEN} {REJECTED}",
        "lists as `chosen`, `rejected` or both: each of the chosen is better than each of the rejected", several,
        RANKING, when=_several, over=(BINARY, BINARYMAGN), lost="an order among the chosen, or among the rejected",
    ),
    Layout(
        "aspect_scores", "scores by aspect in columns", "response|completion|answer",
        "`response` is the completion; the column named by `--aspect`, without it `helpfulness`, is its score",
        by_aspect, SINGLE, when=_by_aspect, lost="the other aspects",
    ),
    Layout(
        "scored", "responses with a score", f"response|answer {SCORE}",
        "`response` is the completion, and the score has any of these names", scored, SINGLE,
        when=lambda values: not found(values, "thought|completion"),
    ),
    Layout(
        "true_false", "answers that are true or false", GRADED,
        "`label` true is the score 1, false 0; without a completion the last turn of `messages` is it", graded, SINGLE,
        when=_graded,
    ),
)  # fmt: skip
