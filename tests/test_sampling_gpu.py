"""The sampler with a shared cache on a GPU: CUDA graphs give bit-identical results to launched kernels."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_layouts import drawn
from test_rollout import contexts

from dwrl_fast.compute import Compute
from dwrl_fast.encode import Thought
from dwrl_fast.errors import NotFiniteError
from dwrl_fast.models.backbone import attend_over_trees
from dwrl_fast.models.model import GenerativeModel
from dwrl_fast.sampling import Limits, TreeSampler, forward

pytestmark = pytest.mark.gpu
HOW: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 0}


def sampler(dtype: str, batch_size: int = 64) -> TreeSampler:
    compute, lm = Compute.resolve(dtype), drawn("Llama").cuda()
    attend_over_trees(lm)
    how: dict[str, Any] = {"autocast": compute.autocast, "float32": compute.float32}
    return TreeSampler(GenerativeModel(lm), [], limits=Limits(batch_size, 1.0), token_budget=100, **how)


def flat(thoughts: list[list[Thought]]) -> list[tuple[list[int], list[float]]]:
    return [(thought.ids, thought.logprobs) for some in thoughts for thought in some]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pass that replayed a graph."""
    found: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(self: torch.cuda.CUDAGraph) -> None:
        found.append(1)
        replay(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_change_nothing(
    dtype: str, temperature: float, replayed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With thoughts that wait for others, in two calls. Each call has its own graphs."""
    engine = sampler(dtype, batch_size=10)
    how = HOW | {"temperature": temperature}
    found = [flat(engine.sample(contexts(), 3, **how)) for _ in range(2)]
    assert len(replayed) > 60
    count = len(replayed)
    monkeypatch.setattr(forward, "GRAPHED", -1)
    launched = flat(engine.sample(contexts(), 3, **how))
    assert found[0] == found[1] == launched and len(replayed) == count


def test_threads_capture_side_by_side(replayed: list[int]) -> None:
    """Each call captures graphs of its own while the other threads run."""
    engine = sampler("bf16")
    alone = [flat(engine.sample(contexts(), 3, **HOW | {"seed": seed})) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda seed: flat(engine.sample(contexts(), 3, **HOW | {"seed": seed % 4})), range(12))
        assert list(found) == 3 * alone
    assert replayed


def test_new_weights_are_seen(replayed: list[int]) -> None:
    engine = sampler("bf16")
    before = flat(engine.sample(contexts(), 3, **HOW))
    with torch.no_grad():
        for p in engine.model.lm.parameters():
            p.mul_(1.05)
    after = flat(engine.sample(contexts(), 3, **HOW))
    assert replayed and before != after


def test_as_on_the_cpu(replayed: list[int]) -> None:
    """In float32 the draws are the same as on the CPU, except if rounding decides."""
    engine = sampler("fp32")
    there = flat(engine.sample(contexts(), 3, **HOW))
    engine.model.lm.cpu()
    here = flat(engine.sample(contexts(), 3, **HOW))
    assert replayed and sum(a[0] != b[0] for a, b in zip(there, here, strict=True)) <= 1


def test_a_model_that_waits_for_the_device_runs_as_it_is(replayed: list[int], caplog: pytest.LogCaptureFixture) -> None:
    engine = sampler("fp32")
    expected = flat(engine.sample(contexts(), 3, **HOW))
    replayed.clear()
    engine.model.lm.base_model.layers[0].register_forward_hook(lambda _, args, out: out.sum().item() and None)
    assert flat(engine.sample(contexts(), 3, **HOW)) == expected
    assert not replayed and "cannot be captured in a CUDA graph" in caplog.text
    torch.cuda.synchronize()


def test_weights_that_hold_nan_are_said() -> None:
    engine = sampler("bf16")
    with torch.no_grad():
        engine.model.lm.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="logits are not finite"):
        engine.sample(contexts(), 3, **HOW)
