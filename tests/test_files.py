"""Files are read with limits, and text cannot control a terminal."""

import dataclasses
import io
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import pytest
import yaml
from rich.table import Table

from bench.reliability.lives import life, lived
from dwrl_fast.console import Terminal, set_up_logging
from dwrl_fast.data import Preference
from dwrl_fast.data.compression import lines_of
from dwrl_fast.dialog import Dialog, Template, limits
from dwrl_fast.dialog.limits import LargeError, LimitError, SlowError, Watched, raise_in, watched, within_bounds
from dwrl_fast.embedded.arrays import EVALUATE, RATE
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.encode import fit
from dwrl_fast.errors import DataError, OverrunError
from dwrl_fast.files import bounded_json, bounded_text, bounded_yaml, check_folder, opened
from dwrl_fast.log import escaped, logger
from dwrl_fast.progress import Display

ROOT = Path(__file__).parents[1]


def test_only_regular_files_are_opened_and_none_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            opened(path)
    with pytest.raises(OSError, match="null byte"):
        opened("a\0b")
    (tmp_path / "text").write_text("ä")
    assert opened(tmp_path / "text").read() == "ä".encode()


def test_texts_and_json_have_bounds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("[1]")
    assert bounded_text(path, 3) == "[1]" and bounded_json(path) == [1]
    with pytest.raises(ValueError, match="larger than"):
        bounded_text(path, 2)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        bounded_json(path)
    path.write_text("[" + "[]," * 4_000_000 + "[]]")
    with pytest.raises(ValueError, match="lists and objects"):
        bounded_json(path, 1 << 30)


def test_yaml_has_bounds_and_says_which_file() -> None:
    assert bounded_yaml("a: &x [1]\nb: *x", "f") == {"a": [1], "b": [1]}
    for text, said in {
        "a: 1\na: 2": 'a given more than once\n  in "f.yaml"',
        "a: " + "[" * 100_000: "nested too deeply",
        "a: &a [*a]": "anchors expand",
        "a: &a {k: v}\nb: {<<: [*a, *a]}": r'merge keys \(<<\) are not read\n  in "f.yaml"',
        "a: 2024-99-99": "month must be",
        "a: " + "x" * (1 << 20): "larger than 1 MiB",
        "a: !!python/object/apply:os.mkdir [x]": "could not determine a constructor",
    }.items():
        with pytest.raises(yaml.YAMLError, match=said):
            bounded_yaml(text, "f.yaml")


def test_a_snapshot_of_the_hub_links_to_its_own_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    check_folder(snapshot)
    (snapshot / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a link to /etc/hostname, which is outside the folder"):
        check_folder(snapshot)
    check_folder("owner/name")  # a name on the hub is not checked


def test_a_folder_of_a_model_may_be_linked_to_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    (tmp_path / "here").symlink_to(tmp_path / "there")
    check_folder(tmp_path / "here")


def test_lines_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwrl_fast.data.compression.MOST", 10)
    assert list(lines_of(io.BytesIO(b"123456789\nabc"), "f", 0)) == [b"123456789\n", b"abc"]
    with pytest.raises(DataError, match="f:8: a row of more than"):
        list(lines_of(io.StringIO("a\nbcdefghijkl\n"), "f", 6))


def test_code_runs_within_bounds() -> None:
    with within_bounds():
        assert sum(range(1000)) == 499500
    with pytest.raises(LimitError), within_bounds():
        jinja2.Template(LOOP).render()
    with pytest.raises(MemoryError), within_bounds():
        "a" * 2**33


def test_threads_and_forked_processes_keep_their_own_limit_of_memory(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)

    def render(_: int) -> None:
        with within_bounds():
            time.sleep(0.01)

    def check() -> None:
        assert resource.getrlimit(resource.RLIMIT_AS) == before

    with ThreadPoolExecutor(4) as pool:
        rendered = pool.map(render, range(40))
        forked = [lived(check, tmp_path / "log") for _ in range(8)]
    assert forked == [0] * 8 and not any(rendered)
    check()


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"


def test_code_that_is_looked_on_runs_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any thread. The error is raised within the context, not after it."""
    with pytest.raises(LimitError, match="more than 256 MiB"):
        render_watched(DOUBLE)
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    with pytest.raises(LimitError, match=r"more than 0\.2 s"):
        render_watched(LOOP)
    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(render_watched, code) for code in (LOOP, "{{ 1 + 1 }}", LOOP)]
        assert [each.exception() is None for each in ends] == [False, True, False]
    with Watched(10):
        assert sum(range(1000)) == 499500


def test_a_text_that_doubles_is_stopped_before_1_gib(tmp_path: Path) -> None:
    """The check waits for no second step of the template: each may double the memory. And no try leaves its memory."""
    render = jinja2.Template(DOUBLE).render
    render_watched("{{ 1 }}")
    idle, *grown = (peak(run, tmp_path / "log") for run in (lambda: None, *(lambda: watched(render, 10),) * 3))
    assert (tmp_path / "log").read_text().count("it takes more than 256 MiB") == 3
    assert max(grown) - idle < 1 << 20


def peak(run: Callable[[], object], log: Path) -> int:
    """KiB of memory that `run` needs at most, in a forked process."""
    return os.wait4(life(run, log), 0)[2].ru_maxrss


def test_memory_that_another_thread_takes_is_not_blamed_on_the_template() -> None:
    kept: list[bytes] = []

    def render() -> str:
        if not kept:
            with ThreadPoolExecutor(1) as other:
                kept.append(other.submit(lambda: b"a" * (limits.MEMORY + (64 << 20))).result())
        until = time.thread_time() + 0.3
        while time.thread_time() < until:
            pass
        return "text"

    with pytest.raises(LargeError), Watched(10):
        render()
    kept.clear()
    assert watched(render, 10) == "text"


def test_an_error_on_its_way_does_not_come_later() -> None:
    with pytest.raises(SlowError), Watched(10) as call:
        call.stopped = SlowError
        sender = threading.Timer(0.1, raise_in, (call.thread, SlowError))
        sender.start()
    sender.join()


def render_watched(code: str) -> None:
    with Watched(10):
        jinja2.Template(code).render()


def test_a_forked_process_has_its_own_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    render_watched("{{ 1 }}")
    assert lived(lambda: render_watched(LOOP), tmp_path / "log") == 1
    assert "it takes more than 0.2 s" in (tmp_path / "log").read_text()


def test_a_chat_template_that_turns_slow_or_long_on_one_row_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    fine = Preference(({"role": "user", "content": "1 2 3"},), ("4", "5"), source="rows.jsonl:1")
    strikes = dataclasses.replace(fine, responses=("4", "7 7"), source="rows.jsonl:2")
    for code, said in {
        LOOP: "more than 0.2 s",
        "{{ 'a' * 3000000 }}": r"it turns \d+ characters into 3,[\d,]+",
    }.items():
        tokenizer = make_tokenizer()
        own = "{% for m in messages %}{% if m['content'] == '7 7' %}" + code + "{% endif %}{% endfor %}"
        tokenizer.chat_template = own + str(tokenizer.chat_template)
        dialog = Dialog(tokenizer, Template(EVALUATE, RATE), "correctness")
        assert fit(fine, dialog, 10**6)[1] == ""
        with pytest.raises(OverrunError, match=rf"rows\.jsonl:2: the chat template .*'1 2 3' .*{said}.*leave that row"):
            fit(strikes, dialog, 10**6)


def test_nothing_from_a_file_speaks_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b]0;owned\x07\u202eb\x9b2J\rc\td\n"
    assert escaped(hostile) == "a\\x1b]0;owned\\x07\\u202eb\\x9b2J\\rc\td\n"
    assert escaped("naïve 你好 👍🏽") == "naïve 你好 👍🏽"
    console = Terminal(width=200)
    set_up_logging(console)
    console.print(hostile)
    logger.log(logging.WARNING, "%s", hostile)
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(capsys.readouterr().out)
    styled = io.StringIO()
    Terminal(file=styled, force_terminal=True, width=80).print("x", style="bold")
    assert "\x1b[1m" in styled.getvalue(), "its own styles stay"


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in sentences, nor in tables, nor beside bars."""
    name = r"part-[ab].jsonl \[/x] [bold]"
    console = Terminal(width=200)
    console.print(f"On {name}")
    table = Table()
    table.add_column(name)
    table.add_row(f"{name} row")
    console.print(table)
    with Display(Terminal(width=200, force_terminal=True)) as display, display.stage(name, 1) as stage:
        stage.advance()
    said = capsys.readouterr().out
    assert f"On {name}" in said and f"{name} row" in said and said.count(name) >= 4


def test_an_error_of_the_data_command_does_not_speak_to_the_terminal(tmp_path: Path) -> None:
    """The name of a column is from the file."""
    path = tmp_path / "evil.csv"
    path.write_text("prompt,chosen,rejected,a\x1b]0;owned\x07,a\x1b]0;owned\x07\n1,2,3,4,5\n")
    command = [sys.executable, "-m", "dwrl_fast.data", "--check", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "owned" in run.stderr and not {"\x1b", "\x07"} & set(run.stderr)
