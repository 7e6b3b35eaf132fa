"""The papers' data sets, in their published schema, become the right rows, split by prompt."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.data.columns import Unusable
from dwrl_fast.data.prepare import prepare_data_set
from dwrl_fast.data.published import DATA_SETS, gsm8k, helpsteer, hh
from dwrl_fast.data.split import Split
from dwrl_fast.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install datasets)")
ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def lines(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def table(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def transcript(turns: list[Row]) -> str:
    heads = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{heads[turn['role']]}: {turn['content']}" for turn in turns)


def hh_files(folder: Path) -> None:
    def row(number: int, split: str) -> Row:
        prompt = [
            user(f"Question {number % 40} of {split}?"),
            assistant("Why?"),
            user("Human: I wonder.\n\nAnd so on."),
        ]
        return {
            "chosen": transcript([*prompt, assistant(f"Yes {number}.")]),
            "rejected": transcript([*prompt, assistant("No.")]),
        }

    lines(folder / "helpful-base/train.jsonl.gz", [row(i, "train") for i in range(60)] + [row(0, "test")])
    lines(
        folder / "harmless-base/train.jsonl.gz", [row(i, "more") for i in range(50)] + [{"chosen": "", "rejected": "x"}]
    )
    lines(folder / "harmless-base/test.jsonl.gz", [row(i, "test") for i in range(30)])
    lines(folder / "red-team-attempts/train.jsonl.gz", [{"transcript": "not pairs"}])


def ultrafeedback_files(folder: Path) -> None:
    def row(number: int) -> Row:
        asked = user(f"Question {number}?")
        scores = {"score_chosen": 8.5, "score_rejected": 8.5 if number % 10 == 0 else 3.0}
        sides = {"chosen": [asked, assistant("Yes.")], "rejected": [asked, assistant("No.")]}
        return {"prompt": asked["content"], "prompt_id": f"{number:x}", **sides, "messages": sides["chosen"], **scores}

    table(folder / "data/train_prefs-00000-of-00001.parquet", [row(i) for i in range(50)])
    table(folder / "data/test_prefs-00000-of-00001.parquet", [row(i) for i in range(45, 70)])
    table(folder / "data/train_sft-00000-of-00001.parquet", [row(i) for i in range(500)])


def ultrainteract_files(folder: Path) -> None:
    rows = []
    for number in range(1010):
        turns = [("user", f"Solve {number // 2}."), ("assistant", "Step 1."), ("user", "Wrong.")]
        trajectory = [{"from": role, "value": text} for role, text in turns[: 1 + 2 * (number % 2)]]
        row = {
            "task": "Math_CoT",
            "dataset": "gsm8k",
            "trajectory": trajectory,
            "chosen": "Right.",
            "rejected": "Left.",
        }
        rows.append(row | {"id": f"{number}", "parent_id": f"{number // 2}"})
    table(folder / "0000_pair.parquet", rows)


def solved(number: int, *right: bool) -> Row:
    def solution(name: str, correct: bool) -> Row:
        return {"solution": f"By {name}: 1 + 1 = <<1+1=2>>2\nA: {2 if correct else 3}", "is_correct": correct}

    names = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    row = {"question": f"Problem {number}?", "ground_truth": "It is 1+1=<<1+1=2>>2\nA: 2"}
    return row | {name: solution(name, correct) for name, correct in zip(names, right, strict=True)}


def gsm8k_files(folder: Path) -> None:
    rows = [solved(number, False, True, False, True) for number in range(400)] + [solved(400, *[True] * 4)]
    lines(folder / "grade_school_math/data/example_model_solutions.jsonl", rows)


def helpsteer_files(folder: Path) -> None:
    def rows(first: int, last: int) -> list[Row]:
        scores = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
        later = "\n<extra_id_1>Assistant\nBecause.\n<extra_id_1>User\nBut why?"
        return [
            {"prompt": f"Question {number}?{later}", "response": f"Answer {side}."} | dict.fromkeys(scores, 4 - side)
            for number in range(first, last)
            for side in range(2)
        ]

    lines(folder / "train.jsonl.gz", rows(0, 30))
    lines(folder / "validation.jsonl.gz", rows(28, 40))
    lines(folder / "preference/preference.jsonl.gz", [{"split": "train"}])


def rmb_files(folder: Path) -> None:
    def row(number: int, category: str) -> Row:
        answers = {
            "chosen": {"llm_name": "a", "answer": "Yes.", "score": 5.0},
            "reject": {"llm_name": "b", "answer": "No.", "score": 4},
        }
        asked = [{"content": f"Question {number // 3}?", "language": "English", "role": "user"}]
        if number % 2:  # then `datasets` hands these objects over as text
            del asked[0]["language"]
            answers["reject"]["rank"] = 2
        path = f"Pairwise_set/{category}/x"
        return {"pair_uid": f"{number}", "conversation_input": asked, **answers, "category_path": path}

    for category, file in (("Helpfulness", "Chat/Discussion"), ("Harmlessness", "S1")):
        path = folder / f"RMB_dataset/Pairwise_set/{category}/{file}.json"
        path.parent.mkdir(parents=True)
        first = 600 * (category == "Harmlessness")
        path.write_text(json.dumps([row(first + i, category) for i in range(600)], indent=1))
    (folder / "RMB_dataset/BoN_set").mkdir()
    (folder / "RMB_dataset/BoN_set/S1.json").write_text('[{"bon_best": 1}]')


FILES: dict[str, Callable[[Path], None]] = {
    "hh": hh_files,
    "ultrafeedback": ultrafeedback_files,
    "ultrainteract": ultrainteract_files,
    "gsm8k": gsm8k_files,
    "helpsteer": helpsteer_files,
    "rmb": rmb_files,
}


def prompts(rows: list[Preference]) -> set[str]:
    return {json.dumps(row.prompt) for row in rows}


def read(folder: Path) -> tuple[list[Preference], list[Preference]]:
    """Read both files and assert that no row is dropped."""
    found = [read_preferences(folder / name) for name in ("train.jsonl", "test.jsonl")]
    assert not any(sum(map(len, dataset.dropped.values())) for dataset in found)
    return found[0].rows, found[1].rows


def count(folder: Path) -> tuple[int, int]:
    return len((folder / "train.jsonl").read_bytes().splitlines()), len(
        (folder / "test.jsonl").read_bytes().splitlines()
    )


def accounted(found: dict[str, Split]) -> None:
    for split in found.values():
        assert split.read == split.used + sum(map(len, split.dropped.values()))
        assert sum(map(len, split.prompts.values())) >= split.written + split.withheld


@pytest.mark.parametrize("name", FILES)
def test_every_data_set_as_it_is_published(tmp_path: Path, name: str) -> None:
    assert set(FILES) == set(DATA_SETS)
    FILES[name](tmp_path / "copy")
    found = prepare_data_set(name, tmp_path / "out", source=str(tmp_path / "copy"))
    accounted(found)
    train, test = read(tmp_path / "out")
    assert not prompts(train) & prompts(test)
    sizes = count(tmp_path / "out")
    assert sizes == (found["train"].written, found["test"].written) and min(sizes) > 0
    account = json.loads((tmp_path / "out/prepared.json").read_text())
    assert account["train"] == json.loads(json.dumps(found["train"].to_dict())) and account["seed"] == 0
    expected = {
        "hh": (110, 30),  # 60 + 50, and one whose prompt the test has
        "ultrafeedback": (40, 23),  # of 50 and 25, less 5 and 2 ties; the test has 5 prompts of the train file
        "ultrainteract": (10, 1000),
        "gsm8k": (1560, 840),  # 6 pairs a problem
        "helpsteer": (56, 24),
        "rmb": (402, 798),  # 3 pairs a prompt
    }
    assert sizes == expected[name]


def test_what_the_rows_hold(tmp_path: Path) -> None:
    for name, files in FILES.items():
        files(tmp_path / name)
        prepare_data_set(name, tmp_path / name / "out", source=str(tmp_path / name))
    rows = {name: read(tmp_path / name / "out")[1] for name in FILES}
    assert [turn["content"] for turn in rows["hh"][0].prompt][1:] == ["Why?", "Human: I wonder.\n\nAnd so on."]
    assert rows["ultrafeedback"][0].responses == ("Yes.", "No.") and rows["ultrafeedback"][0].margin == 5.5
    assert {len(row.prompt) for row in rows["ultrainteract"]} == {1, 3}
    assert {row.aspect for row in rows["ultrainteract"]} == {row.aspect for row in rows["gsm8k"]} == {"correctness"}
    assert [turn["content"] for turn in rows["helpsteer"][0].prompt][1:] == ["Because.", "But why?"]
    assert rows["helpsteer"][0].responses == ("Answer 0.", "Answer 1.") and rows["helpsteer"][0].margin == 1
    assert {row.aspect for row in rows["rmb"]} == {"helpfulness", "harmlessness"}


def test_solutions_are_paired_right_against_wrong() -> None:
    notes: Counter[str] = Counter()
    row = solved(1, True, False, False, False)
    row["175b_verification"]["solution"] = "It goes on and on: 1 + 1 + 1"
    found = gsm8k(row, notes)
    right = ["It is 1+1=2\nThe answer is: 2", "By 6b_finetuning: 1 + 1 = 2\nThe answer is: 2"]
    wrong = [f"By {name}: 1 + 1 = 2\nThe answer is: 3" for name in ("6b_verification", "175b_finetuning")]
    assert [(one["chosen"], one["rejected"]) for one in found] == [(a, b) for a in right for b in wrong]
    assert notes == {"solutions left out: no answer at the end": 1}
    with pytest.raises(Unusable, match="all solutions are right"):
        gsm8k(solved(1, True, True, True, True), notes)


def test_turns_of_the_prompts() -> None:
    notes: Counter[str] = Counter()
    with pytest.raises(Unusable, match="not a transcript"):
        hh({"chosen": "Hello.", "rejected": "\n\nHuman: a\n\nAssistant: b"}, notes)
    plain = {"prompt": "One\n\ntwo <extra_id_1> three", "response": "r", "helpfulness": 0}
    assert helpsteer(plain, notes) == [
        {"prompt": [user("One\n\ntwo <extra_id_1> three")], "completion": "r", "score": 0}
    ]


def test_the_draw_follows_the_seed(tmp_path: Path) -> None:
    hh_files(tmp_path / "copy")

    def made(name: str, seed: int) -> tuple[bytes, bytes]:
        folder = tmp_path / name
        prepare_data_set("hh", folder, source=str(tmp_path / "copy"), seed=seed, train_rows=50, test_rows=20)
        assert count(folder) == (50, 20)
        train, test = read(folder)
        assert not prompts(train) & prompts(test)
        return (folder / "train.jsonl").read_bytes(), (folder / "test.jsonl").read_bytes()

    first = made("a", 0)
    assert made("b", 0) == first
    other = made("c", 1)
    assert other[0] != first[0] and other[1] != first[1]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    hh_files(tmp_path / "copy")
    train = prepare_data_set("hh", tmp_path / "out", source=str(tmp_path / "copy"), train_rows=100)["train"]
    assert train.dropped == {
        "not a transcript that begins with Human: or Assistant:": [51]
    }  # harmless-base comes first
    assert (train.read, train.used, train.written, train.withheld, train.not_drawn) == (112, 111, 100, 1, 10)


def test_a_row_may_lose_some_of_the_pairs_it_makes(tmp_path: Path) -> None:
    rows = [solved(number, False, True, False, False) for number in range(5)]
    rows[2]["6b_finetuning"]["solution"] = rows[2]["ground_truth"]
    lines(tmp_path / "rows.jsonl", rows)
    found = prepare_data_set("gsm8k", tmp_path / "out", source=str(tmp_path / "rows.jsonl"), test_rows=6)
    assert (found["train"].read, found["train"].used, found["train"].dropped) == (5, 5, {})
    assert found["train"].notes == {"left out of the rows that one published row makes: identical responses": 1}
    assert sum(count(tmp_path / "out")) == 5 * 2 * 3 - 1


def test_one_file_is_split_by_prompt(tmp_path: Path) -> None:
    gsm8k_files(tmp_path / "copy")
    file = tmp_path / "copy/grade_school_math/data/example_model_solutions.jsonl"
    prepare_data_set("gsm8k", tmp_path / "out", source=str(file), test_rows=60)
    assert count(tmp_path / "out") == (2340, 60)
    train, test = read(tmp_path / "out")
    assert len(prompts(test)) == 10 and not prompts(train) & prompts(test)


@pytest.mark.parametrize(
    ("name", "source", "error", "said"),
    [
        ("rmb", None, ConfigError, "git clone"),
        ("hh", "empty", DataError, "has no h[*]/train.jsonl.gz; is it a copy of hh"),
        ("hh", "missing.jsonl", DataError, "cannot be read"),
        ("hh", "other.jsonl", DataError, "row 1: the row does not have the published form.*'text'.*right file"),
        ("gsm8k", "other.jsonl", DataError, "the row does not have the published form"),
        ("ultrafeedback", "broken.parquet", DataError, "cannot be read"),
        ("helpsteer", "one.jsonl", DataError, "too few usable rows"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, source: str | None, error: type[Exception], said: str) -> None:
    (tmp_path / "empty").mkdir()
    lines(tmp_path / "other.jsonl", [{"text": "x"}])
    lines(tmp_path / "one.jsonl", [{"prompt": "x", "response": r, "helpfulness": len(r)} for r in ("a", "bb")])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(error, match=said):
        prepare_data_set(name, tmp_path / "out", source=None if source is None else str(tmp_path / source))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name, data in DATA_SETS.items() if data.repository is not None])
def test_what_is_asked_of_the_hub(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, *, data_files: Any, streaming: bool) -> None:
        asked.append((path, data_files, streaming))
        raise ConnectionError("no hub here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"no hub here.*give a local copy with --source"):
        prepare_data_set(name, tmp_path / "out")
    data = DATA_SETS[name]
    address = data.repository if name == "gsm8k" else None
    assert asked == [("json", {"train": address}, True) if address else (data.repository, dict(data.files), True)]


def test_on_topic_pairs(tmp_path: Path) -> None:
    """From any layout: every response is once right and once wrong, in one file, paired with that of another prompt."""
    said = [{"prompt": f"Question {i}?", "chosen": f"Answer {i}.", "rejected": "No."} for i in range(60)]
    said += [{"prompt": "Question 7?", "chosen": "Another.", "rejected": "No."}]
    said += [
        {"prompt": "Any?", "chosen": "Answer 8.", "rejected": "No."},
        {"prompt": "Same?", "chosen": "A", "rejected": "A"},
    ]
    said += [{"prompt": "Long? " + 40 * "x", "chosen": "Yes.", "rejected": "No."}]
    lines(tmp_path / "pairs.jsonl", said)
    how: dict[str, Any] = {"source": str(tmp_path / "pairs.jsonl"), "longest": 40}
    found = prepare_data_set("on-topic", tmp_path / "out", test_rows=20, **how)
    train = found["train"]
    assert (train.read, train.used, train.written, train.withheld, found["test"].written) == (64, 60, 40, 20, 20)
    assert train.dropped == {
        "its prompt occurs in an earlier row": [61],
            "its response occurs in an earlier row"
        : [62], "identical responses": [63],
        "prompt and response have over 40 characters": [64],
    }  # fmt: skip
    for name, count in (("train", 40), ("test", 20)):
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        right, wrong = ({row[side] for row in rows} for side in ("chosen", "rejected"))
        assert len(rows) == count and right == wrong and len(right) == count
        assert all(
            row["prompt"][0]["content"] == row["chosen"].replace("Answer", "Question")[:-1] + "?" for row in rows
        )
    again = [prepare_data_set("on-topic", tmp_path / str(seed), test_rows=20, seed=seed, **how) for seed in (0, 1)]
    assert again[0]["train"].prompts == train.prompts != again[1]["train"].prompts
    lines(tmp_path / "pairs.jsonl", said[:5])
    odd = prepare_data_set("on-topic", tmp_path / "odd", test_rows=2, **how)["train"]
    assert (odd.used, sum(map(len, odd.dropped.values()))) == (4, 1)


def test_on_topic_pairs_need_a_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--prepare on-topic: give --source"):
        prepare_data_set("on-topic", tmp_path / "out")


def test_the_command(tmp_path: Path) -> None:
    gsm8k_files(tmp_path / "copy")

    def run(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, "-m", "dwrl_fast.data", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    arguments = ("--prepare", "gsm8k", "--source", tmp_path / "copy", "--output_dir", tmp_path / "out")
    status, said = run(*arguments)
    assert (
        status == 0
        and "401 published rows read = 400 used + 1 dropped" in said
        and "1560 rows" in said.replace(",", "")
    )
    status, said = run(*arguments)
    assert status == 2 and "nothing is overwritten" in said
    status, said = run("--prepare", "if", "--output_dir", tmp_path / "more")
    assert status == 2 and "vendor" in said
    status, said = run("--prepare", "hh")
    assert status == 2 and "--output_dir" in said


# Real rows, put back into the schema they were published in


def shared_rows(shared: Path, name: str) -> list[Row]:
    with gzip.open(shared / f"{name}.jsonl.gz", "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def same(found: list[Preference], rows: list[Row]) -> None:
    """Assert equal pairs, ignoring white space at the ends of turns."""

    def plain(prompt: Any, responses: Any) -> str:
        return json.dumps(
            [[(turn["role"], turn["content"].strip()) for turn in prompt], [r.strip() for r in responses]]
        )

    expected = {plain(row["prompt"], [row[side][0]["content"] for side in ("chosen", "rejected")]) for row in rows}
    assert {plain(row.prompt, row.responses) for row in found} == expected


def test_real_hh(shared: Path, tmp_path: Path) -> None:
    rows = {split: shared_rows(shared, f"hh/hh_{split}") for split in ("train", "test")}
    bad = [row["raw"] for row in shared_rows(shared, "edge/real_bad_rows") if row["source"] == "anthropic-hh"]
    for split, good in rows.items():
        whole = [{side: transcript(row["prompt"] + row[side]) for side in ("chosen", "rejected")} for row in good]
        lines(tmp_path / f"copy/helpful-base/{split}.jsonl.gz", whole + bad * (split == "train"))
    found = prepare_data_set("hh", tmp_path / "out", source=str(tmp_path / "copy"))
    accounted(found)
    train, test = read(tmp_path / "out")
    same(test, rows["test"])
    assert (found["train"].read, found["train"].used) == (len(rows["train"]) + len(bad), len(rows["train"]))
    assert found["test"].dropped == {} and len(train) == found["train"].used


def test_real_ultrafeedback_and_rmb(shared: Path, tmp_path: Path) -> None:
    rows = shared_rows(shared, "if/ultrafeedback_train")
    made = [
        {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
        | {"score_chosen": 2.0, "score_rejected": 1.0}
        for row in rows
    ]
    table(tmp_path / "uf.parquet", made)
    prepare_data_set("ultrafeedback", tmp_path / "uf", source=str(tmp_path / "uf.parquet"), test_rows=100)
    train, test = read(tmp_path / "uf")
    same(train + test, rows)
    rows = shared_rows(shared, "rmb/rmb_helpful_test")
    made = [
        {
            "conversation_input": [turn | {"language": "English"} for turn in row["prompt"]],
            "chosen": {"answer": row["chosen"][0]["content"], "llm_name": "a", "score": 4.5},
            "reject": {"answer": row["rejected"][0]["content"], "llm_name": "b", "score": 4},
            "category_path": "Pairwise_set/Helpfulness/Chat/Discussion",
        }
        for row in rows
    ]
    (tmp_path / "rmb.json").write_text(json.dumps(made, indent=1))
    prepare_data_set("rmb", tmp_path / "rmb", source=str(tmp_path / "rmb.json"), test_rows=100)
    train, test = read(tmp_path / "rmb")
    same(train + test, rows)


def test_a_copy_is_read_from_its_folder_whatever_it_is_called(unpickling: Path) -> None:
    """`datasets` has readers with these names, which would read the files of the working folder."""
    for name in ("pandas", "json"):
        ultrafeedback_files(Path(name))
        found = prepare_data_set("ultrafeedback", Path(f"out-{name}"), source=name)
        assert found["train"].read == 50 and found["test"].read == 25
    assert not unpickling.exists()
