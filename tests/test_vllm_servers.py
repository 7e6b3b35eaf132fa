"""Servers that die, hang, restart, give wrong answers or return too little: the reaction of the sampler."""

import gc
import math
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import Die, FakeVllm, hang, serving

from dwrl_fast.errors import ConfigError, NotFiniteError, SamplerError
from dwrl_fast.ranks import ALONE
from dwrl_fast.sampling import Limits, Rating, RatingSampler
from dwrl_fast.sampling.vllm import VllmSampler, VllmSettings, adapter, make_engine
from dwrl_fast.sampling.vllm.engine import Answer

CPU = torch.device("cpu")
HOW: dict[str, Any] = {"max_tokens": 4, "temperature": 1.0, "seed": 0}
CONTEXTS = [[1, 2, 3], [4, 5], [1, 2, 3]]


def sampler_of(*urls: str, timeout: float = 10.0) -> VllmSampler:
    settings = VllmSettings("server", urls, timeout=timeout)
    engine = make_engine(settings, None, torch.float32, CPU, ALONE, Limits(4, 1.0), trains=True)
    return VllmSampler(engine, (2,), lambda: [("weight", torch.ones(3))], "run")


@pytest.fixture
def fake() -> FakeVllm:
    return FakeVllm()


@pytest.fixture
def url(fake: FakeVllm) -> Iterator[str]:
    with serving(fake) as address:
        yield address


@pytest.mark.parametrize("wrong", ["thought", "label"])
def test_an_engine_rests_and_gets_its_weights_again_after_nan(wrong: str) -> None:
    """If one rank alone kept its weights, the others would wait for it when they are sent again."""
    done: list[str] = []

    class Resting:
        longest, sleeps, restarts = 64, True, 0

        def load(self, weights: Any, version: str) -> None:
            done.append("load")

        def sleep(self) -> None:
            done.append("sleep")

        def close(self) -> None: ...

        def complete(self, asks: Any, told: Any) -> list[Answer]:
            label = asks[0].labels
            value = math.nan if (wrong == "label") == bool(label) else -1.0
            return [Answer([2], [value], (value,) * len(ask.labels)) for ask in asks]

    sampler = VllmSampler(Resting(), (2,), list, "run")
    rating = Rating(lambda place, ids: [7], 2, (8, 9), "vocab")
    for _ in range(2):
        with pytest.raises(NotFiniteError):
            sampler.rated(CONTEXTS, 1, rating, **HOW)
    assert done == ["load", "sleep"] * 2 and sampler.sent is None


def test_it_is_a_rating_sampler(url: str) -> None:
    sampler = sampler_of(url)
    assert isinstance(sampler, RatingSampler) and not sampler.float32
    counted: list[int] = []
    found = sampler.sample(CONTEXTS, 2, **HOW, progress=counted.append)
    assert [[len(t.ids) for t in some] for some in found] == [[4, 4]] * 3
    assert found[0] == found[2] and sum(counted) == 3
    assert sampler.sample([], 2, **HOW) == []


@pytest.mark.parametrize("normalization", ["vocab", "yes_no"])
def test_scores_are_of_the_label(url: str, normalization: str) -> None:
    rating = Rating(lambda number, ids: [*ids, number], 1, (5, 3), normalization)
    found = sampler_of(url).rated(CONTEXTS, 1, rating, **HOW)
    norm = math.log(sum(math.exp(-k) for k in range(100)))
    expected = -5 - norm if normalization == "vocab" else -math.log1p(math.exp(5 - 3))
    assert [some[0].score for some in found] == pytest.approx([expected] * 3)


def test_weights_go_first_and_the_reset_goes_last(fake: FakeVllm, url: str) -> None:
    sampler = sampler_of(url)
    sampler.sample(CONTEXTS, 1, **HOW)
    fake.routes.clear()
    sampler.sample(CONTEXTS, 1, **HOW)
    assert "reload_weights" not in fake.routes
    sampler.changed()
    fake.routes.clear()
    sampler.sample(CONTEXTS, 1, **HOW)
    order = ["reload_weights", "repack_heads", "/reset_prefix_cache", "/update_weight_version"]
    assert [route for route in fake.routes if route in order] == order
    assert fake.routes.index("/update_weight_version") < fake.routes.index("/v1/completions")
    folder = Path(fake.weights)
    assert folder.is_dir()
    sampler.close()
    assert not folder.exists()


class Sender:
    """Calls the client as vLLM's sender does."""

    def __init__(self, client: Any, world_size: int, meeting: Any, known: list[Any], weights: Any) -> None:
        self.client, self.known, self.weights = client, known, weights
        self.sent: list[Any] = []
        client.init_weight_transfer_engine({"world_size": world_size, "rank_offset": 1})

    def send_weights(self) -> None:
        self.client.start_weight_update()
        self.client.update_weights({"names": [name for name, _, _ in self.known]})
        self.sent.append([(name, weight.dtype, tuple(weight.shape)) for name, weight in self.weights()])
        self.client.finish_weight_update()


def test_weights_by_nccl_to_two_servers(fake: FakeVllm, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of each server have their own ranks. The reset and the version are still sent last."""
    made: list[Sender] = []
    monkeypatch.setattr(adapter, "nccl_sender", lambda *given: made.append(Sender(*given)) or made[-1])  # type: ignore
    other = FakeVllm()
    for each in (fake, other):
        each.config["weight_transfer_config"] = {"backend": "nccl"}
    with serving(other) as second:
        settings = VllmSettings("server", (url, second), timeout=5.0)
        engine = make_engine(settings, None, torch.float32, torch.device("cuda"), ALONE, Limits(4, 1.0), trains=True)
        sampler = VllmSampler(engine, (2,), lambda: [("weight", torch.ones(3))], "run")
        for _ in range(2):
            fake.routes.clear()
            sampler.changed()
            sampler.sample(CONTEXTS, 1, **HOW)
            order = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
            order.append("/update_weight_version")
            assert [route for route in fake.routes if route in order] == order and "reload_weights" not in fake.routes
            assert fake.written[-1] == other.written[-1] == '["weight"]'
        (sender,) = made
        assert sender.sent == [[("weight", torch.float32, (3,))]] * 2
        assert (fake.joined["rank_offset"], other.joined["rank_offset"], other.joined["world_size"]) == (1, 3, 5)
        other.restart()
        with pytest.raises(SamplerError, match="instead of the latest ones, as after a restart"):
            sampler.sample(CONTEXTS, 1, **HOW)
        sampler.close()
        assert fake.routes[-1] == other.routes[-1] == "/shutdown_weight_transfer_engine"


def test_servers_of_which_one_takes_no_nccl_get_a_folder(fake: FakeVllm, url: str) -> None:
    fake.config["weight_transfer_config"] = {"backend": "nccl"}
    with serving(FakeVllm()) as second:
        settings = VllmSettings("server", (url, second), timeout=5.0)
        engine = make_engine(settings, None, torch.float32, torch.device("cuda"), ALONE, Limits(4, 1.0), trains=True)
        VllmSampler(engine, (2,), lambda: [("weight", torch.ones(3))], "run").sample(CONTEXTS, 1, **HOW)
    assert "reload_weights" in fake.routes and "/update_weights" not in fake.routes


def test_a_reset_that_fails_ends_the_run(fake: FakeVllm, url: str) -> None:
    sampler = sampler_of(url)
    fake.reset = False
    with pytest.raises(SamplerError, match="did not reset its prefix cache"):
        sampler.sample(CONTEXTS, 1, **HOW)
    assert fake.version == "default" and fake.written[-1:] != [fake.weights]


def test_a_restarted_server_gets_the_weights_again(fake: FakeVllm, url: str) -> None:
    sampler = sampler_of(url)
    sampler.sample(CONTEXTS, 1, **HOW)
    sent = fake.weights
    fake.restart()
    fake.written.clear()
    sampler.sample(CONTEXTS, 1, **HOW)
    assert set(fake.written[-2:]) == {sent} and fake.weights == sent


def test_what_a_server_wrote_around_a_restart_is_thrown_away(fake: FakeVllm, url: str) -> None:
    sampler = sampler_of(url)
    sampler.sample(CONTEXTS, 1, **HOW)
    fake.written.clear()
    once = iter([True])

    def restarts(body: dict[str, Any]) -> None:
        if next(once, False):
            fake.restart()

    fake.fault = restarts
    found = sampler.sample(CONTEXTS, 1, **HOW)
    assert "its file's" in fake.written and len(found) == 3
    assert "its file's" not in fake.written[-2:], "stale thoughts were taken"


def test_another_program_at_the_server_is_not_borne(fake: FakeVllm, url: str) -> None:
    sampler = sampler_of(url)
    sampler.sample(CONTEXTS, 1, **HOW)
    fake.fault = lambda body: fake.answer("/update_weight_version", {"new_version": "theirs"}) and None
    with pytest.raises(SamplerError, match=r"another program changed its weights.*3 times"):
        sampler.sample(CONTEXTS, 1, **HOW)


def raising(body: dict[str, Any]) -> None:
    raise Die


def short(body: dict[str, Any]) -> dict[str, Any]:
    logprobs = {"token_logprobs": [-1.0] * 2, "top_logprobs": [{}] * 2}
    return {"choices": [{"prompt_token_ids": body["prompt"], "token_ids": [7, 7], "logprobs": logprobs}]}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (raising, "disconnected"),
        (hang, "no answer within 1 s"),
        (short, "ended after 2 of 4 tokens"),
        (lambda body: {"choices": []}, "cannot be read"),
        (lambda body: short(body | {"prompt": [9]}), "prompt came back changed"),
    ],
    ids=["dies", "hangs", "too short", "too few", "another prompt"],
)
def test_trouble_is_bounded_and_named(fake: FakeVllm, url: str, fault: Any, said: str) -> None:
    sampler = sampler_of(url, timeout=1.0)
    sampler.sample(CONTEXTS, 1, **HOW)
    fake.fault, before = fault, fake.routes.count("/v1/completions")
    with pytest.raises(
        SamplerError, match=rf"(?s){url} failed.*{said}.*asked 3 times.*api_server.*resume_from_checkpoint"
    ):
        sampler.sample(CONTEXTS, 1, **HOW)
    assert 3 <= fake.routes.count("/v1/completions") - before <= 6


def test_one_trouble_is_got_over(fake: FakeVllm, url: str) -> None:
    sampler = sampler_of(url)
    once = iter([True])

    def dies(body: dict[str, Any]) -> None:
        if next(once, False):
            raise Die

    fake.fault = dies
    assert len(sampler.sample(CONTEXTS, 2, **HOW)) == 3


def test_no_server_at_all() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
    with pytest.raises(SamplerError, match=r"no vLLM server answers at .*vllm_server_timeout.*\n.*api_server"):
        sampler_of(url, timeout=0.2)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model_config", "generation_config", "auto"),
        ("model_config", "logprobs_mode", "raw_logprobs"),
        ("model_config", "dtype", "torch.bfloat16"),
        ("model_config", "override_generation_config", {"top_k": 5}),
        ("parallel_config", "worker_extension_cls", ""),
        ("scheduler_config", "enable_chunked_prefill", True),
    ],
)
def test_a_server_started_otherwise_is_refused(fake: FakeVllm, url: str, part: str, name: str, value: Any) -> None:
    fake.config[part][name] = value
    with pytest.raises(SamplerError, match=rf"{name} is .*\n.*--logprobs-mode processed_logprobs"):
        sampler_of(url)


def test_defaults_that_alter_are_found_by_the_probe(fake: FakeVllm, url: str) -> None:
    fake.defaults = {"temperature": 0.6}
    with pytest.raises(SamplerError, match="its own defaults"):
        sampler_of(url)


def test_another_version_of_vllm_is_refused(fake: FakeVllm, url: str) -> None:
    fake.vllm_version = "0.28.1"
    with pytest.raises(SamplerError, match=r"vLLM 0\.28\.1.*0\.29 to 0\.33"):
        sampler_of(url)


def test_too_long_sequences_are_refused_before_they_are_sent(url: str) -> None:
    with pytest.raises(ConfigError, match="may take 71 tokens, but vLLM takes at most 64"):
        sampler_of(url).sample([[1] * 67], 1, **HOW)


def test_a_rating_needs_room_for_its_label(url: str) -> None:
    """The turns after the thought take 2 tokens, and vLLM is asked for one more."""
    rating = Rating(lambda place, ids: [7, 7], 2, (8, 9), "vocab")
    with pytest.raises(ConfigError, match="may take 65 tokens, but vLLM takes at most 64"):
        sampler_of(url).rated([[1] * 58], 1, rating, **HOW)
    sampler_of(url).rated([[1] * 57], 1, rating, **HOW)


def test_two_servers_share_the_thoughts() -> None:
    one, two = FakeVllm(), FakeVllm()
    with serving(one) as a, serving(two) as b:
        sampler = sampler_of(a, b)
        found = sampler.sample([[k, k] for k in range(1, 9)], 2, **HOW)
        assert [len(some) for some in found] == [2] * 8
        assert one.weights == two.weights and one.version == two.version == "run/0#0"
        assert len(one.written) == len(two.written) == 2 + 1 + 8  # the requests of the probe, and half of the thoughts


def test_weights_leave_no_folder(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder is kept for servers that restart, until the next weights or the end of the process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sampler = sampler_of(url)
    for _ in range(2):
        sampler.sample(CONTEXTS, 1, **HOW)
        sampler.changed()
        assert len(list(tmp_path.iterdir())) == 1
    del sampler
    gc.collect()
    assert not list(tmp_path.iterdir())
