"""Tests of vLLM with vLLM itself. Its own Python runs each case, as `vllm_cases.py CASE FOLDER`.

A case is a function of an empty folder; it fails by raising.
"""

import contextlib
import copy
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.processes import free_port

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "smollm2"
HEAD = 32  # the smallest head size that vLLM's attention supports on a CPU
CPU = torch.device("cpu")
FIXED = [3 + i * 7 % 20 for i in range(150)]  # more than a block of the CPU, 128 tokens, so that the cache is used


def start(model: Path, port: int, log: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start a server on the CPU, as in the documentation."""
    from dwrl_fast.sampling.vllm.adapter import server_command

    said, _, rest = server_command(str(model), dtype="float32", cpu=True, port=str(port)).partition(" python ")
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", said.split("=")[0]: said.split("=")[1]}
    words = [sys.executable, *rest.split(), "--enforce-eager", "--max-model-len", "1024", *more]
    with log.open("wb") as file:
        return subprocess.Popen(
            words, env=os.environ | own, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


@contextlib.contextmanager
def server(model: Path, log: Path, *more: str) -> Iterator[str]:
    port = free_port()
    process = start(model, port, log, *more)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def settings(url: str | None) -> Any:
    from dwrl_fast.sampling.vllm import VllmSettings

    if url is None:
        return VllmSettings(max_model_length=1024)
    return VllmSettings("server", (url,), timeout=300.0)


def sampler_of(model: Any, url: str | None, stops: tuple[int, ...]) -> Any:
    """A `VllmSampler` of `model`, in this process or with the server at `url`."""
    from dwrl_fast.models.export import exported
    from dwrl_fast.ranks import ALONE
    from dwrl_fast.sampling import Limits
    from dwrl_fast.sampling.vllm import VllmSampler, make_engine

    engine = make_engine(settings(url), model.lm.config, torch.float32, CPU, ALONE, Limits(64, 1.0), trains=True)
    return VllmSampler(engine, stops, partial(exported, model, None, torch.float32), "test")


def text_logprobs(model: Any, ids: list[int]) -> list[float]:
    with torch.no_grad():
        logits = plain(model)(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def plain(model: Any) -> Any:
    """The model with the attention of transformers."""
    lm = copy.deepcopy(model.lm).eval()
    lm.set_attn_implementation("sdpa")
    return lm


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def change(model: Any, seed: int, by: float = 0.1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.lm.parameters():
            p.mul_(1 + by * torch.randn_like(p))


def smollm2() -> Any:
    from dwrl_fast.batching.layout import Layout
    from dwrl_fast.compute import Compute
    from dwrl_fast.models.model import load_generative, place

    return place(load_generative(str(SMOLLM2), None, 0), Compute(CPU, torch.float32), Layout("tree", 4096, 0, CPU))


def check_smollm2(url: str | None) -> None:
    """Greedy thoughts and scores are those of the sampler in this package. Sampled thoughts depend only on their
    seeds.
    """
    from dwrl_fast.sampling import Limits, Rating, TreeSampler

    model = smollm2()
    stops = (198, 30)
    contexts = [list(range(1000 + 40 * i, 1000 + 40 * i + size)) for i, size in enumerate((20, 150, 300))]
    ours, theirs = TreeSampler(model, stops, limits=Limits(64, 1.0), token_budget=4096), sampler_of(model, url, stops)
    how: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "seed": 5}
    for normalization in ("vocab", "yes_no"):
        rating = Rating(lambda number, ids: [*ids, 28, 29, 30 + number], 3, (5, 9), normalization)
        for a, b in zip(ours.rated(contexts, 1, rating, **how), theirs.rated(contexts, 1, rating, **how), strict=True):
            assert a[0].ids == b[0].ids and a[0].ended == b[0].ended, (a, b)
            assert apart(a[0].logprobs, b[0].logprobs) < 1e-3
            assert abs(a[0].score - b[0].score) < 1e-3, (a[0].score, b[0].score)
    warm = how | {"temperature": 0.7}
    counted: list[int] = []
    first = theirs.sample([*contexts, contexts[0]], 3, **warm, progress=counted.append)
    assert sum(counted) == 4 and first[3] == first[0] and len({tuple(t.ids) for t in first[0]}) == 3
    alone = theirs.sample(contexts[1:2], 2, **warm)
    assert [t.ids for t in alone[0]] == [t.ids for t in first[1][:2]]
    for context, (thought, *_) in zip(contexts, first, strict=False):
        with torch.no_grad():
            logits = plain(model)(torch.tensor([context + thought.ids])).logits[0, len(context) - 1 : -1] / 0.7
        found = logits.log_softmax(-1).gather(-1, torch.tensor(thought.ids)[:, None])[:, 0].tolist()
        assert apart(found, thought.logprobs) < 1e-3
    change(model, 1, by=0.01)
    theirs.changed()
    assert apart(theirs.text_logprobs(FIXED[:60]), text_logprobs(model, FIXED[:60])) < 1e-3
    theirs.close()


def smollm2_in_process(folder: Path) -> None:
    check_smollm2(None)
    train_smollm2(folder)


def smollm2_by_server(folder: Path) -> None:
    with server(SMOLLM2, folder / "log") as url:
        check_smollm2(url)


def check_synced(sampler: Any, model: Any) -> None:
    """After each change the engine has the trainer's new weights. Without the reset it has old keys."""
    before = sampler.text_logprobs(FIXED)
    for seed in (1, 2, 3):
        change(model, seed)
        sampler.changed()
        found = sampler.text_logprobs(FIXED)
        assert apart(found, text_logprobs(model, FIXED)) < 1e-3, seed
        assert apart(found, before) > 1e-2
        before = found
    without_reset(sampler.engine)
    change(model, 4)
    sampler.changed()
    stale = apart(sampler.text_logprobs(FIXED), text_logprobs(model, FIXED))
    assert stale > 1e-2, f"this test would not see a reset that is left out: {stale}"


def without_reset(engine: Any) -> None:
    for one in getattr(engine, "servers", [engine]):
        one.reset = lambda: None


def in_process(folder: Path) -> None:
    """Synced weights, and runs of the model itself and of its adapters."""
    from tiny import tiny_folder, tiny_model, tiny_pairs

    model = tiny_model(head=HEAD)
    sampler = sampler_of(model, None, (2,))
    check_synced(sampler, model)
    sampler.close()
    tiny_pairs(folder / "pairs.jsonl")
    tiny = tiny_folder(folder / "tiny", head=HEAD)
    check_training(folder, None, tiny, "run", max_steps=3)
    check_training(folder, None, tiny, "lora", max_steps=2, use_peft=True, lora_r=2)


def by_server(folder: Path) -> None:
    """The same with a server, and a run on two ranks compared with a run of one process."""
    from tiny import tiny_folder, tiny_model, tiny_pairs

    model = tiny_model(head=HEAD)
    tiny_pairs(folder / "pairs.jsonl", 24)
    tiny = tiny_folder(folder / "tiny", head=HEAD)
    with server(tiny, folder / "log") as url:
        sampler = sampler_of(model, url, (2,))
        check_synced(sampler, model)
        kept = sampler.engine.folder
        sampler.close()
        assert not kept.exists()
        check_training(folder, url, tiny, "run", max_steps=3)
        check_ranks(folder, url)


def restart(folder: Path) -> None:
    """A restarted server has the weights of its file. It gets the latest weights before any of its results is used."""
    from tiny import tiny_folder, tiny_model

    model, port = tiny_model(head=HEAD), free_port()
    tiny_folder(folder / "tiny", head=HEAD)
    first = start(folder / "tiny", port, folder / "log")
    try:
        sampler = sampler_of(model, f"http://127.0.0.1:{port}", (2,))
        change(model, 1)
        sampler.changed()
        expected = sampler.text_logprobs(FIXED[:20])
    finally:
        end(first)
    second = start(folder / "tiny", port, folder / "log2")
    try:
        assert apart(sampler.text_logprobs(FIXED[:20]), expected) < 1e-3
        assert apart(expected, text_logprobs(model, FIXED[:20])) < 1e-3
    finally:
        end(second)


HOW: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 0}
CONTEXTS = [FIXED[i : i + 20] for i in range(0, 60, 10)]


def died(folder: Path) -> None:
    """vLLM in this process is restarted if its model fails within a batch. The batch is the same."""
    from tiny import tiny_model

    model = tiny_model(head=HEAD)
    sampler = sampler_of(model, None, (2,))
    change(model, 1)
    sampler.changed()
    expected = sampler.sample(CONTEXTS, 3, **HOW)
    passes: list[int] = []

    def plant(worker: Any) -> None:
        def strike(module: Any, args: Any, kwargs: Any = None) -> None:
            passes.append(1)
            if len(passes) == 5:
                raise RuntimeError("planted")

        worker.model_runner.get_model().register_forward_pre_hook(strike, with_kwargs=True)

    sampler.engine.llm.collective_rpc(plant)
    assert sampler.sample(CONTEXTS, 3, **HOW) == expected
    assert len(passes) == 5 and sampler.engine.restarts == 1
    assert apart(sampler.text_logprobs(FIXED[:40]), text_logprobs(model, FIXED[:40])) < 1e-3
    sampler.close()


def killed(folder: Path) -> None:
    """A server is killed within a batch and started again. The batch is the same."""
    from tiny import tiny_folder, tiny_model

    from dwrl_fast.sampling.vllm.server import Server

    model, port = tiny_model(head=HEAD), free_port()
    tiny_folder(folder / "tiny", head=HEAD)
    servers = [start(folder / "tiny", port, folder / "log")]
    ask, asked = Server.ask, 0

    def counted(self: Server, *given: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 5:
            os.killpg(servers[0].pid, signal.SIGKILL)  # its engine is a separate process
            servers[0].wait()
            servers.append(start(folder / "tiny", port, folder / "log2"))
        return ask(self, *given)

    try:
        sampler = sampler_of(model, f"http://127.0.0.1:{port}", (2,))
        change(model, 1)
        sampler.changed()
        expected = sampler.sample(CONTEXTS, 3, **HOW)
        setattr(Server, "ask", counted)  # noqa: B010 - mypy takes no assignment to a method
        found = sampler.sample(CONTEXTS, 3, **HOW)
        assert len(servers) == 2 and sampler.engine.restarts == 1, (len(servers), sampler.engine.restarts)
        requests = 3 * len({tuple(context) for context in CONTEXTS})  # equal contexts are requested once
        assert asked >= 5 + requests, (asked, requests)  # the requests before the kill, and the whole batch after it
        assert [[t.ids for t in some] for some in found] == [[t.ids for t in some] for some in expected]
        sampler.close()
    finally:
        setattr(Server, "ask", ask)  # noqa: B010
        for each in servers:
            end(each)


def refused(folder: Path) -> None:
    """If a server lacks a flag, the error names the server and the correct command line."""
    from tiny import tiny_folder, tiny_model

    from dwrl_fast.errors import SamplerError

    tiny = tiny_folder(folder / "tiny", head=HEAD)
    (tiny / "generation_config.json").write_text('{"top_k": 2, "temperature": 0.6}')
    with server(tiny, folder / "log", "--generation-config", "auto", "--logprobs-mode", "raw_logprobs") as url:
        try:
            sampler_of(tiny_model(head=HEAD), url, (2,))
        except SamplerError as error:
            for said in ("processed_logprobs", "generation_config is 'auto'", "--generation-config vllm", "127.0.0.1"):
                assert said in str(error), error
        else:
            raise AssertionError("it was taken")
        from dwrl_fast.sampling.vllm import adapter
        from dwrl_fast.sampling.vllm.server import Server

        probed = Server(url, 60.0, "float32", 4)
        probed.model = probed.call("GET", "/v1/models")["data"][0]["id"]
        try:
            probed._probe()
        except SamplerError as error:
            assert "temperature 0.5" in str(error)
        else:
            raise AssertionError("the probe of raw log-probs")
        assert adapter.on_cpu(probed.call("GET", "/server_info", config_format="json")["vllm_config"])


def nccl(folder: Path) -> None:
    """vLLM's own sender with our client, without the broadcast itself, which needs GPUs. Servers are told the names of
    exactly the weights that are broadcast, in order. They answer as vLLM does (fake_vllm.py).
    """
    from fake_vllm import FakeVllm, serving
    from vllm.distributed.weight_transfer import nccl_engine

    from dwrl_fast.ranks import ALONE
    from dwrl_fast.sampling.vllm.nccl import Nccl
    from dwrl_fast.sampling.vllm.server import Server

    broadcast: list[torch.Tensor] = []

    def packed(iterator: Any, group: Any, src: int, post_iter_func: Any, **buffers: Any) -> None:
        broadcast.extend(post_iter_func(item).clone() for item in iterator)

    setattr(nccl_engine, "open_trainer_endpoint", lambda info: object())  # noqa: B010
    setattr(nccl_engine, "packed_nccl_broadcast_producer", packed)  # noqa: B010
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    fake = FakeVllm()
    with serving(fake) as url:
        way = Nccl([Server(url, 5.0, "float32", 1)], ALONE)
        for by in (1.0, 2.0):
            broadcast.clear()
            way.send(lambda by=by: ((name, by * weight) for name, weight in weights.items()))  # type: ignore[misc]
            assert [torch.equal(x, by * y) for x, y in zip(broadcast, weights.values(), strict=True)] == [True, True]
        way.close()
    assert (fake.joined["world_size"], fake.joined["rank_offset"], fake.joined["packed"]) == (3, 1, True)
    calls = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert [route for route in fake.routes if route in calls] == calls * 2 and fake.weights == '["a", "b"]'


def check_training(folder: Path, url: str | None, model: Path, name: str, **changes: Any) -> None:
    """A run of `train` that checks the sampler's weights after each sync."""
    import json

    from rich.console import Console
    from tiny import tiny_config

    from dwrl_fast.sampling.vllm import VllmSampler
    from dwrl_fast.train import run

    proven: list[list[float]] = []
    refresh = VllmSampler.refresh

    def proving(self: VllmSampler) -> None:
        sent = self.sent
        refresh(self)
        if self.sent != sent:
            held.append(self)
            sampled = VllmSampler.text_logprobs(self, FIXED[:40])
            proven.append(sampled)
            own = [(name, weight) for name, weight in self.weights()]
            check = replaced(model, dict(own))
            assert apart(sampled, text_logprobs(check, FIXED[:40])) < 1e-3

    held: list[VllmSampler] = []
    setattr(VllmSampler, "refresh", proving)  # noqa: B010 - mypy takes no assignment to a method
    changes |= {"model_name_or_path": str(model), "output_dir": str(folder / name), "use_vllm": True}
    config = tiny_config(folder, **changes)
    if url is not None:
        config = replace(config, vllm_mode="server", vllm_server_base_url=(url,))
    else:
        config = replace(config, vllm_max_model_length=1024)
    try:
        result = run(config, Console(quiet=True))
    finally:
        setattr(VllmSampler, "refresh", refresh)  # noqa: B010
    assert result["steps"] == config.max_steps and len(proven) >= config.max_steps
    for a, b in itertools.pairwise(proven):
        assert apart(a, b) > 1e-6
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == config.max_steps
    for line in lines:
        assert line["sampler_gap_max"] < 1e-3
        assert {"share_sampling", "share_sync", "share_old_logprobs"} <= line.keys()
        assert 0.5 < sum(v for k, v in line.items() if k.startswith("share_")) <= 1.001
    assert "engine" in held[0].__dict__ and not held[0].close.alive  # it was closed


def replaced(folder: Path, weights: dict[str, torch.Tensor]) -> Any:
    from dwrl_fast.models.model import load_generative

    model = load_generative(str(folder), None, 0)
    assert not model.lm.load_state_dict(weights, strict=False).unexpected_keys
    model.lm.tie_weights()
    return model


def train_smollm2(folder: Path) -> None:
    import json

    rows = [
        {"prompt": f"What is {i} plus {i}?", "chosen": f"It is {2 * i}.", "rejected": f"It is {2 * i + 1}."}
        for i in range(2, 4)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"max_steps": 1, "rollout_batch_size": 2, "num_generations": 2, "max_completion_length": 16}
    small: dict[str, Any] = {"generation_cache_gib": 1.0, "async_save": False}  # other tests run at the same time
    check_training(folder, None, SMOLLM2, "run", **config, **small, token_budget=4096, learning_rate=1e-5, save_steps=0)


def started(folder: Path, name: str, how: list[str], **options: Any) -> list[dict[str, Any]]:
    """Run the command in `folder`/`name`, and return the metrics."""
    from dwrl_fast.training.runlog import read_metrics

    given: dict[str, Any] = {"model_name_or_path": folder / "tiny", "dataset_name": folder / "pairs.jsonl"}
    given |= {"rollout_batch_size": 8, "minibatch_size": 4, "max_steps": 3, "max_completion_length": 6}
    given |= {"num_generations": 3, "learning_rate": 1e-3, "save_steps": 0, "use_vllm": "true", **options}
    words = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, *how, *words, "--output_dir", str(folder / name)]
    ran = subprocess.run(command, env=os.environ | {"SLOW": "1"}, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return read_metrics(folder / name / "metrics.jsonl")


def check_ranks(folder: Path, url: str) -> None:
    """One process and two ranks with one server, and two ranks with one vLLM each, give the same figures and weights.
    With the server, the thoughts of one rank take longer.
    """
    from safetensors.torch import load_file

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    by_server = {"vllm_mode": "server", "vllm_server_base_url": url}
    one = started(folder, "one", ["-m", "dwrl_fast.train"], **by_server)
    others = {
        "two": started(folder, "two", [*launch, str(ROOT / "tests/vllm_drill.py")], **by_server),
        "each": started(
            folder,
            "each",
            [*launch, "-m", "dwrl_fast.train"],
            vllm_max_model_length=512,
            generation_cache_gib=0.5,
        ),
    }
    weights = load_file(folder / "one" / "model" / "model.safetensors")
    for name, other in others.items():
        assert len(one) == len(other) == 3
        for a, b in zip(one, other, strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-4 and a["thought_length"] == b["thought_length"], (name, a, b)
            assert b["sampler_gap_max"] < 1e-3
        found = load_file(folder / name / "model" / "model.safetensors")
        assert max((weights[key] - found[key]).abs().max().item() for key in weights) < 1e-4, name


if __name__ == "__main__":
    began = time.monotonic()
    globals()[sys.argv[1]](Path(sys.argv[2]))
    print(f"ok {sys.argv[1]} {time.monotonic() - began:.0f} s", flush=True)
    os._exit(0)  # gloo's threads sometimes abort a process that ends normally
