"""Tree, packed and padded batches through whole models give the same log-probs, scores, losses and gradients."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from drawn_groups import drawn_groups, make_group, make_sequence
from fakes import FakePolicy
from hypothesis import given, settings
from tiny import tiny_config, tiny_dialog
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.batching.batch import Size
from dwrl_fast.batching.layout import Layout
from dwrl_fast.batching.tree import TreeBatch
from dwrl_fast.compute import Compute
from dwrl_fast.data import read_preferences
from dwrl_fast.embedded.tokenizer import IDS
from dwrl_fast.encode import Group
from dwrl_fast.errors import ModelError
from dwrl_fast.methods import StepMetrics
from dwrl_fast.models.backbone import attend_over_trees
from dwrl_fast.models.model import GenerativeModel, place
from dwrl_fast.models.pretrained import save_pretrained

CPU = torch.device("cpu")
COMPUTE = Compute(CPU, torch.float32)
SHARED: dict[str, Any] = {
    "vocab_size": 96,  # larger than the tokenizer's vocabulary
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": IDS["<|end|>"],
    "pad_token_id": IDS["<|pad|>"],
}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {"sliding_window": 9, "use_sliding_window": True, "layer_types": WINDOWS},
    "Mistral": {"sliding_window": 9},
    "Gemma": {"num_key_value_heads": 1},
    "Gemma2": {
        "sliding_window": 9,
        "layer_types": WINDOWS,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "Gemma3": {"sliding_window": 9, "layer_types": WINDOWS, "query_pre_attn_scalar": 8},
}


def drawn(family: str, seed: int = 0) -> Any:
    """A random language model of three layers, with weights so large that attention and windows matter."""
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**SHARED | FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, f"{family}ForCausalLM")(config)


def make(folder: Path, lm: Any, **changes: Any) -> FakePolicy:
    """`dwrl` on `lm`, with a joint phase, so that one backward pass gives all gradients."""
    policy = FakePolicy(tiny_config(folder, alternate="joint", joint_reward="centred", **changes))
    runtime = policy.runtime
    in_use = lm.dtype == torch.float32  # padding on the left makes eager attention in float64 give NaN
    policy.model = place(GenerativeModel(lm), runtime.compute, runtime.layout, thinks=in_use)
    policy.roll_out.runtime = dataclasses.replace(runtime, model=policy.model)
    return policy


def outcome(policy: FakePolicy, groups: list[Group], packing: Any, budget: int = 10**6) -> dict[str, Tensor]:
    """Log-probs and scores in the order of `groups`, the loss, and the gradient of every parameter."""
    layout = dataclasses.replace(policy.runtime.layout, packing=packing, token_budget=budget)
    model, metrics = policy.model, StepMetrics()
    model.zero_grad()
    found: dict[str, Tensor] = {"loss": torch.zeros((), dtype=torch.float64)}
    logprobs: dict[int, list[Tensor]] = {}
    batches = layout.batches(groups)
    minibatch = Size.of(groups)
    for batch in batches:
        with policy.runtime.compute.autocast():
            loss = policy.method.loss("joint", model, batch, minibatch, metrics)
            loss.backward()
            head = model(batch, tokens=True)
            each = head.logprobs(head.token, batch.targets)
        parts = iter(each.detach().split(batch.lengths.tolist()))
        logprobs |= {id(group): [next(parts) for _ in group.flat] for group in batch.groups}
        found["loss"] += loss.detach()
    found["logprobs"] = torch.cat([o for group in groups for o in logprobs[id(group)]])
    found["scores"] = torch.tensor([s for group in metrics.scores(groups) for response in group for s in response])
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return found | gradients


def apart(found: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, float]:
    """Relative differences in the 2-norm. If terms cancel, the difference is divided by a larger norm: that of the loss
    by the mean absolute score, that of a gradient by at least a thousandth of the norm of all gradients.
    """
    whole = torch.stack([y.double().norm() for name, y in like.items() if "." in name]).norm().item()
    least = {name: 1e-3 * whole for name in like if "." in name}
    least["loss"] = like["scores"].abs().mean().item() if "loss" in like else 0.0
    return {
        name: (found[name].double() - y.double()).norm().item() / max(y.double().norm().item(), least.get(name, 1e-30))
        for name, y in like.items()
    }


def assert_within(found: dict[str, Tensor], like: dict[str, Tensor], bound: float) -> None:
    far = {name: d for name, d in apart(found, like).items() if not d <= bound}
    assert not far, far


def sampled(policy: FakePolicy, module_folder: Path, rows: int = 3) -> list[Group]:
    return policy.rollout(read_preferences(module_folder / "pairs.jsonl").rows[:rows])[0]


def made(shape: list[list[list[int]]], x: list[int], seed: int = 0) -> Group:
    """One group with plausible old log-probs. `shape` has the tokens of each thought of each response. Two tokens
    follow each thought.
    """
    g = torch.Generator().manual_seed(seed)
    responses = []
    for k, thoughts in enumerate(shape):
        context = [*x, 5 + k, 6, 7 + k]
        responses.append([make_sequence([*context, *t, 3, 4], len(context), len(context) + len(t)) for t in thoughts])
    group = make_group(responses)
    return group.with_logprobs(
        [[(-3 + 0.3 * torch.randn(len(t.ids), generator=g)).tolist() for t in row] for row in group.thoughts]
    )


X = [8, 9, 10, 11, 9, 8]
CASES: dict[str, Callable[[], list[Group]]] = {
    "one-token thoughts": lambda: [made([[[12], [13], [14]], [[12], [15], [16]]], X)],
    "identical thoughts": lambda: [made([[[12, 13]] * 3, [[12, 14]] * 3], X)],
    "empty thoughts beside others": lambda: [made([[[], [12]], [[13, 14], []]], X)],
    "everything shared": lambda: [made([[[12, 13]] * 2, [[12, 14]] * 2], X) for _ in range(2)],
    "nothing shared": lambda: [made([[[12, 13], [14]], [[15], [16, 17]]], [20 + p, 9, 10]) for p in range(2)],
    "thoughts that begin alike": lambda: [made([[[12, 13, 14, 15], [12, 13, 15], [12, 13]], [[12], [13], [14]]], X)],
    "long": lambda: [made([[list(range(10, 60)), [*range(10, 50), 5]], [[7] * 70, [7] * 69 + [8]]], X * 12)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(module_folder: Path, family: str) -> None:
    """With sampled thoughts of real dialogs. Windows of 9 tokens end inside thoughts, responses and prompts."""
    policy = make(module_folder, drawn(family))
    groups = sampled(policy, module_folder)
    padded = outcome(policy, groups, "padded")
    for packing in ("tree", "packed"):
        assert_within(outcome(policy, groups, packing), padded, 1e-5)
    assert_within(outcome(policy, groups, "tree", budget=1), padded, 1e-5)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("case", CASES)
def test_cases(module_folder: Path, family: str, case: str) -> None:
    policy, groups = make(module_folder, drawn(family)), CASES[case]()
    padded = outcome(policy, groups, "padded")
    for packing in ("tree", "packed"):
        assert_within(outcome(policy, groups, packing), padded, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_models(module_folder: Path, family: str) -> None:
    """The bound is 1e-6 because the norms of transformers compute in float32 for every dtype."""
    policy = make(module_folder, drawn(family))
    groups = sampled(policy, module_folder, 2)
    policy.model.double()
    padded = outcome(policy, groups, "padded")
    for packing in ("tree", "packed"):
        assert_within(outcome(policy, groups, packing), padded, 1e-6)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2"])
def test_bfloat16_is_as_good_as_plain_bfloat16(module_folder: Path, family: str) -> None:
    """Root mean squares of the errors over random models, compared with the same models in float64.

    The loss is one number, and its error in plain bfloat16 can be small by chance; the other values have thousands of
    numbers. The loss changes at most as much as the two marginals of a pair, so its bound is that of the scores.
    """
    errors: dict[str, list[dict[str, float]]] = {"tree": [], "packed": [], "padded": []}
    for seed in range(12):
        policy = make(module_folder, drawn(family, seed), dtype="bf16")
        groups = sampled(policy, module_folder, 2)
        exact = make(module_folder, copy.deepcopy(policy.model.lm).double())
        truth = outcome(exact, groups, "padded")
        for packing, found in errors.items():
            found.append(apart(outcome(policy, groups, packing), truth))
    rms = {
        packing: {name: torch.tensor([e[name] for e in found]).square().mean().sqrt().item() for name in found[0]}
        for packing, found in errors.items()
    }
    plain = rms["padded"] | {"loss": rms["padded"]["scores"]}
    for packing in ("tree", "packed"):
        far = {n: (e, plain[n]) for n, e in rms[packing].items() if not e <= 2 * plain[n]}
        assert not far, far


def test_a_ranking_of_five_is_one_tree(module_folder: Path) -> None:
    """Five responses to one prompt, each with its thoughts, with a likelihood of all five."""
    model = place(GenerativeModel(drawn("Qwen2")), COMPUTE, Layout("tree", 1, 0, CPU))
    group = made([[[12 + k, 13], [14], [15, 16, 12]] for k in range(5)], X)
    found = {}
    for packing in ("tree", "packed", "padded"):
        (batch,) = Layout(packing, 10**6, 0, CPU).batches([group])  # type: ignore[arg-type]
        model.zero_grad()
        head = model(batch, tokens=True)
        scores = ops.yes_no_logprob(head.score, head.weight, 3, 4)
        marginals = batch.grid(scores).logsumexp(-1)
        ranking = torch.stack([marginals[:, k:].logsumexp(-1) - marginals[:, k] for k in range(4)]).sum()
        (ranking - ops.linear_logprob(head.token, head.weight, batch.targets).sum()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[packing] = gradients | {"scores": scores.detach()}
    assert batch.naive_tokens > 2 * Layout("tree", 10**6, 0, CPU).batches([group])[0].trunk_tokens
    assert_within(found["tree"], found["padded"], 1e-5)
    assert_within(found["packed"], found["padded"], 1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn_groups())
def test_random_trees_against_the_unpacked_forward(groups: list[Group]) -> None:
    lm = _random_trees_model()
    model = place(GenerativeModel(lm), COMPUTE, Layout("tree", 1, 0, CPU))
    for packing in ("tree", "packed"):
        (batch,) = Layout(packing, 10**6, 0, CPU).batches(groups)  # type: ignore[arg-type]
        with torch.no_grad():
            head = model(batch, tokens=True)
        scores, tokens = iter(head.score), iter(head.token)
        for group in batch.groups:
            for sequence in group.flat:
                with torch.no_grad():
                    alone = lm.base_model(torch.tensor([sequence.ids]), use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(next(scores), alone[-1], rtol=1e-5, atol=1e-5)
                for t in range(sequence.thought.start, sequence.thought.stop):
                    torch.testing.assert_close(next(tokens), alone[t - 1], rtol=1e-5, atol=1e-5)


def _random_trees_model(cache: list[Any] = []) -> Any:  # noqa: B006 - one model for all examples
    if not cache:
        cache.append(drawn("Qwen3"))
    return cache[0]


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2"])
@pytest.mark.parametrize("packing", ["tree", "packed"])
def test_no_cross_talk(family: str, packing: Any) -> None:
    """If one thought's tokens change, the log-probs and scores of the other thoughts stay the same bit for bit."""
    model = place(GenerativeModel(drawn(family)), COMPUTE, Layout(packing, 1, 0, CPU))
    thoughts = [[12, 13, 14, 15, 16], [17, 13, 12, 11, 10], [18, 19, 20, 21, 22]]
    other = [thoughts[0], [17, 30, 31, 32, 33], thoughts[2]]

    def read(shape: list[list[list[int]]]) -> tuple[list[Tensor], Tensor]:
        (batch,) = Layout(packing, 10**6, 0, CPU).batches([made(shape, X), made([thoughts, thoughts], [40, *X])])
        with torch.no_grad():
            head = model(batch, tokens=True)
            each = ops.linear_logprob(head.token, head.weight, batch.targets, softcap=head.softcap)
            scores = ops.yes_no_logprob(head.score, head.weight, 3, 4, softcap=head.softcap)
        return list(each.split(batch.lengths.tolist())), scores

    (before, s), (after, t) = read([thoughts, thoughts]), read([other, thoughts])
    changed = [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if not torch.equal(x, y)]
    assert changed == (s != t).nonzero().flatten().tolist() == [7]  # the longer group is first in the batch


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("packing", ["tree", "packed", "padded"])
def test_gradient_checkpointing_changes_nothing(module_folder: Path, family: str, packing: str) -> None:
    """The backward pass computes layers again. They then know the tree only from their arguments."""
    policy = make(module_folder, drawn(family))
    groups = sampled(policy, module_folder, 2)
    plain = outcome(policy, groups, packing)
    policy.model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.train()
    calls = []
    policy.model.lm.base_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    again = outcome(policy, groups, packing)
    assert len(calls) == 3  # for the loss, its backward pass and the log-probs
    for name, y in plain.items():
        assert torch.equal(again[name], y), name


def test_a_saved_model_is_a_plain_one(tmp_path: Path) -> None:
    """The saved config does not mention this package's attention."""
    model = place(GenerativeModel(drawn("Gemma2")), COMPUTE, Layout("tree", 1, 0, CPU))
    save_pretrained(tmp_path / "model", model, tiny_dialog(), {})
    assert "tree" not in (tmp_path / "model" / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config._attn_implementation == drawn("Gemma2").config._attn_implementation


def test_a_softcap_is_kept() -> None:
    """With SDPA, some versions of transformers ignore the soft-cap and others raise an error."""
    ids = torch.tensor([[8, 9, 10, 11, 12, 13]])
    by_sdpa, eager = drawn("Gemma2"), drawn("Gemma2")
    by_sdpa.config._attn_implementation_internal, eager.config._attn_implementation_internal = "sdpa", "eager"
    assert torch.equal(GenerativeModel(by_sdpa).lm(ids).logits, eager(ids).logits)


def test_an_attention_keyword_not_understood_is_refused() -> None:
    lm = drawn("Llama")
    attend_over_trees(lm)
    batch = Layout("tree", 100, 0, CPU).batches(CASES["one-token thoughts"]())[0]
    assert isinstance(batch, TreeBatch)
    with pytest.raises(ModelError, match=r"LlamaAttention asks its attention for novelty"):
        lm.base_model(
            batch.input_ids[None],
            attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool),
            position_ids=batch.position_ids[None],
            plan=batch.plan,
            novelty=1.0,
        )


@pytest.mark.parametrize("packing", ["tree", "packed", "padded"])
def test_a_default_device_does_not_reach_the_batches(packing: Any) -> None:
    """They are on the layout's device, even if a caller creates a model under `with torch.device(...)`."""
    group = make_group([[make_sequence([1, 2, 3, 4], 2, 3)], [make_sequence([1, 2, 5], 2, 3)]])
    with torch.device("meta"):
        (batch,) = Layout(packing, 100, 0, CPU).batches([group])
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    where = {name: x.device for name, x in tensors.items() if isinstance(x, Tensor)}
    assert len(where) >= 10 and set(where.values()) == {CPU}
    assert batch.slots.tolist() == [[[0], [1]]] and batch.places.tolist() == [0, 1]
