"""Sampling with a shared cache: every prefix once, thoughts that start and end, scores from it, bounded memory."""

from collections import Counter
from typing import Any

import pytest
import torch
from test_layouts import COMPUTE, CPU, FAMILIES, drawn
from test_rollout import ROWS, contexts, plain_sampler, tree_sampler
from tiny import tiny_dialog, tiny_model

from dwrl_fast.batching.layout import Layout
from dwrl_fast.encode import Group, Thought, closed_groups, response_requests
from dwrl_fast.errors import ConfigError, DataError, NotFiniteError
from dwrl_fast.models.backbone import attend_over_trees
from dwrl_fast.models.model import GenerativeModel, place
from dwrl_fast.sampling import Limits, RatingSampler, TransformersSampler, TreeSampler, forward, sample_groups
from dwrl_fast.sampling.cache import Cache
from dwrl_fast.sampling.prefixes import LEAST, Prefix, prefix_tree
from dwrl_fast.scoring import GenerativeJudging, Runtime

GENERATOR = torch.Generator().manual_seed(0)
LONG = torch.randint(5, 90, (3, 200), generator=GENERATOR).tolist()
TEXTS = [  # of several depths: three share 150 tokens, one continues another, one shares nothing, one occurs twice
    LONG[0][:150] + LONG[1][:40],
    LONG[0][:150] + LONG[2][:30],
    LONG[0][:150] + LONG[1][:40] + LONG[2][:70],
    LONG[1][:9],
    LONG[2],
    LONG[1][:9],
]


def engine_of(lm: Any, batch_size: int = 64, token_budget: int = 10**6, stops: tuple[int, ...] = ()) -> TreeSampler:
    attend_over_trees(lm)
    return TreeSampler(GenerativeModel(lm), stops, limits=Limits(batch_size, 1.0), token_budget=token_budget)


def flat(thoughts: list[list[Thought]]) -> list[Thought]:
    return [thought for some in thoughts for thought in some]


def walk(nodes: list[Prefix]) -> list[Prefix]:
    return sorted({node for end in nodes for node in end.path()}, key=lambda node: node.number)


def test_the_tree_holds_every_context_and_shares_what_is_long_enough() -> None:
    short = [[*range(LEAST - 1), 50], [*range(LEAST - 1), 51], [*range(LEAST), 52], [*range(LEAST), 53]]
    for texts in (TEXTS, short, TEXTS[::-1], [[1], [1]], contexts()):
        ends = prefix_tree(texts)
        for text, end in zip(texts, ends, strict=True):
            assert [i for node in end.path() for i in node.ids] == list(text)
        for node in walk(ends):
            assert node.position == (node.parent.stop if node.parent else 0) and node.ids
            assert node.below == sum(node in end.path() for end in ends)
    stored = {len(texts): sum(len(node.ids) for node in walk(prefix_tree(texts))) for texts in (TEXTS, short)}
    assert stored[6] == 150 + 40 + 30 + 70 + 9 + 200
    assert stored[4] == 2 * LEAST + LEAST + 2  # LEAST - 1 common tokens are too few to share
    assert [node.number for node in walk(prefix_tree(TEXTS))] == list(range(len(walk(prefix_tree(TEXTS)))))


def test_nodes_are_numbered_in_depth_first_order() -> None:
    for node in (nodes := walk(prefix_tree(TEXTS))):
        below = [other.number for other in nodes if node in other.path()]
        assert below == list(range(node.number, node.number + len(below)))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_sample_as_one_by_one(family: str) -> None:
    """With windows, soft-caps and grouped heads, the draws are the same as with one cache per thought, and the
    log-probs are those of the forward pass. This holds in one pass, and with so little memory that contexts are
    computed in pieces and thoughts start as others end.
    """
    lm = drawn(family)
    want = TransformersSampler(drawn(family), [3], 0, batch_size=64)
    expected = flat(want.sample(TEXTS, 3, max_tokens=20, temperature=0.9, seed=4))
    for batch_size, budget in ((64, 10**6), (5, 37)):
        engine = engine_of(lm, batch_size, budget, stops=(3,))
        found = flat(engine.sample(TEXTS, 3, max_tokens=20, temperature=0.9, seed=4))
        same = [(a, b) for a, b in zip(found, expected, strict=True) if a.ids == b.ids]
        assert len(found) - len(same) <= 1
        for a, b in same:
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4) and a.ended == b.ended
    assert len({len(thought.ids) for thought in expected}) > 1, "some thoughts must end before others"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_thoughts_are_those_of_generate(family: str) -> None:
    engine, lm = engine_of(drawn(family)), drawn(family)
    lm.generation_config.eos_token_id = None
    for text, (thought,) in zip(TEXTS, engine.sample(TEXTS, 1, max_tokens=12, temperature=0.0, seed=0), strict=True):
        made = lm.generate(torch.tensor([text]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert thought.ids == made[0, len(text) :].tolist()


def test_ten_thousand_short_thoughts_follow_the_exact_probabilities() -> None:
    """A chi-square test of whole thoughts of two tokens. Pairs of thoughts about a context are independent."""
    lm, n, context = tiny_model().lm, 10_000, contexts()[0]
    engine = tree_sampler(batch_size=4096)
    (thoughts,) = engine.sample([context], n, max_tokens=2, temperature=0.6, seed=3)
    stops = tiny_dialog().stop_ids
    with torch.no_grad():
        first = (lm(torch.tensor([context])).logits[0, -1] / 0.6).softmax(-1)
        rows = torch.tensor([[*context, i] for i in range(len(first))])
        second = (lm(rows).logits[:, -1] / 0.6).softmax(-1)
    exact: dict[tuple[int, ...], float] = {(i,): first[i].item() for i in stops}
    exact |= {
        (i, j): (first[i] * second[i, j]).item() for i in range(len(first)) if i not in stops for j in range(len(first))
    }
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    seen = Counter(tuple(thought.ids) for thought in thoughts)
    common = {ids: n * p for ids, p in exact.items() if n * p > 5}
    chi2 = sum((seen[ids] - p) ** 2 / p for ids, p in common.items())
    degrees = len(common) - 1
    assert degrees > 10 and chi2 < degrees + 4 * (2 * degrees) ** 0.5
    rare = n - sum(common.values())
    assert sum(count for ids, count in seen.items() if ids not in common) <= rare + 5 * rare**0.5 + 5
    pairs = Counter((a.ids[0], b.ids[0]) for a, b in zip(thoughts[::2], thoughts[1::2], strict=True))
    alone = {(i, j): n / 2 * (first[i] * first[j]).item() for i in range(len(first)) for j in range(len(first))}
    common_pairs = {key: p for key, p in alone.items() if p > 5}
    chi2 = sum((pairs[key] - p) ** 2 / p for key, p in common_pairs.items())
    assert chi2 < len(common_pairs) + 4 * (2 * len(common_pairs)) ** 0.5


def test_every_prefix_is_computed_once_and_only_new_tokens_after() -> None:
    """The model computes the tokens of the tree, and of each thought all tokens except the last."""
    engine = tree_sampler()
    passed: list[int] = []
    engine.model.lm.base_model.register_forward_pre_hook(
        lambda _, args, options: passed.append(options["input_ids"].numel()), with_kwargs=True
    )
    texts = [text[:60] for text in [*LONG, *LONG]] + [LONG[0][:60] + LONG[1][:20]]
    texts = [[i % 20 for i in text] for text in texts]
    thoughts = flat(engine.sample(texts, 4, max_tokens=9, temperature=1.0, seed=0))
    probe = 1
    assert sum(passed) == probe + 3 * 60 + 20 + sum(len(thought.ids) - 1 for thought in thoughts)


def scored(groups: list[Group], model: GenerativeModel) -> list[float]:
    """Scores from a forward pass over whole sequences."""
    dialog = tiny_dialog()
    runtime = Runtime(model, dialog, COMPUTE, Layout("padded", 10**6, dialog.pad_id, CPU))
    judging = GenerativeJudging(runtime, {"score_normalization": "vocab"})
    return [s for group in runtime.run_batches(groups, judging._scores) for some in group for s in some]


@pytest.mark.parametrize(("batch_size", "budget"), [(64, 10**6), (3, 11)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_from_the_cache_are_those_of_a_forward_pass(batch_size: int, budget: int, temperature: float) -> None:
    engine, dialog = tree_sampler(batch_size, budget), tiny_dialog()
    requests = response_requests(ROWS, dialog)
    n = 1 if temperature == 0 else 12
    how: dict[str, Any] = {"max_tokens": 6, "temperature": temperature, "seed": 0}
    groups = sample_groups(requests, dialog, engine, n, **how, normalization="vocab")
    thoughts = [thought for group in groups for some in group.thoughts for thought in some]
    assert temperature == 0 or {thought.ended for thought in thoughts} == {True, False}
    expected = scored(groups, tiny_model())
    assert [thought.score for thought in thoughts] == pytest.approx(expected, abs=1e-5)
    without = sample_groups(requests, dialog, engine, n, **how)
    assert [t.ids for group in without for some in group.thoughts for t in some] == [t.ids for t in thoughts]
    assert all(t.score is None for group in without for some in group.thoughts for t in some)


def test_scores_are_normalised_as_asked() -> None:
    engine, dialog = tree_sampler(), tiny_dialog()
    how: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "seed": 0}
    requests = response_requests(ROWS, dialog)
    both = [
        [t.score or 0.0 for group in groups for (t,) in group.thoughts]
        for groups in (sample_groups(requests, dialog, engine, 1, **how, normalization=x) for x in ("vocab", "yes_no"))
    ]
    assert all(a < b for a, b in zip(*both, strict=True))


def test_a_sampler_that_cannot_rate_is_not_asked_to() -> None:
    dialog, engine = tiny_dialog(), plain_sampler()
    assert isinstance(tree_sampler(), RatingSampler) and not isinstance(engine, RatingSampler)
    how: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "seed": 0}
    (group, *_) = sample_groups(response_requests(ROWS, dialog), dialog, engine, 1, **how, normalization="vocab")
    assert group.thoughts[0][0].score is None
    closed = closed_groups(response_requests(ROWS[:1], dialog), group.thoughts, dialog)
    assert closed[0].sequences == group.sequences


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Cache]:
    """The caches that are created."""
    caches: list[Cache] = []
    init = Cache.__init__

    def make(self: Cache, blocks: int) -> None:
        caches.append(self)
        init(self, blocks)

    monkeypatch.setattr(Cache, "__init__", make)
    return caches


def test_memory_is_bounded_and_thoughts_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for one context and one thought is enough to write all thoughts, and the thoughts are the same."""
    caches = watched(monkeypatch)
    lm = drawn("Llama")
    roomy = engine_of(lm)
    expected = flat(roomy.sample(TEXTS, 3, max_tokens=70, temperature=1.0, seed=0))
    block = roomy.block_bytes()
    assert block == 3 * 2 * 64 * (8 + 16) * 4  # layers, heads, tokens, channels of keys and of padded values, bytes
    least = 5 + 2  # 150 + 40 + 70 tokens are in 3 + 1 + 2 blocks, 200 are in 4; 70 of a thought are in 2
    tight = TreeSampler(roomy.model, [], limits=Limits(64, (least + 1) * block / 2**30), token_budget=100)
    found = flat(tight.sample(TEXTS, 3, max_tokens=70, temperature=1.0, seed=0))
    assert caches[-1].blocks == least + 1 and max(cache.blocks for cache in caches) > 20
    assert sum(a.ids != b.ids for a, b in zip(found, expected, strict=True)) <= 1
    less = TreeSampler(roomy.model, [], limits=Limits(64, least * block / 2**30), token_budget=100)
    with pytest.raises(ConfigError, match=r"260 tokens with a thought of up to 70 takes .* MiB.*generation_cache_gib"):
        less.sample(TEXTS, 3, max_tokens=70, temperature=1.0, seed=0)


def test_everything_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = watched(monkeypatch)
    tree_sampler(3, 20).sample(contexts(), 4, max_tokens=7, temperature=1.0, seed=0)
    (one,) = [cache for cache in caches if cache.blocks > 1]
    assert sorted(one.free) == list(range(one.blocks)) and one.layers


def test_steps_of_few_shapes_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, the padding of a step is neither kept nor seen."""
    how: dict[str, Any] = {"max_tokens": 7, "temperature": 1.0, "seed": 0}
    expected = flat(tree_sampler(5, 20).sample(contexts(), 3, **how))
    monkeypatch.setattr(forward.Forward, "padded", lambda self, count: forward.recurring(count))
    engine, shapes = tree_sampler(5, 20), set()
    engine.model.lm.base_model.register_forward_pre_hook(
        lambda _, args, options: shapes.add(options["input_ids"].shape[1]), with_kwargs=True
    )
    found = flat(engine.sample(contexts(), 3, **how))
    assert shapes == {1, 64} and sum(a.ids != b.ids for a, b in zip(found, expected, strict=True)) <= 1


def test_numbers_that_recur_are_few_and_close() -> None:
    found = [forward.recurring(n) for n in range(1, 5000)]
    assert all(0 <= m - n < max(64, n / 8) and m >= n for n, m in enumerate(found, start=1))
    assert len(set(found)) <= 16 + 8 * 3 + 3


def test_contexts_are_counted_as_they_finish() -> None:
    done: list[int] = []
    tree_sampler(3).sample(contexts(), 4, max_tokens=7, temperature=1.0, seed=0, progress=done.append)
    assert sum(done) == len(contexts())


def test_no_context_and_an_empty_one() -> None:
    assert tree_sampler().sample([], 4, max_tokens=7, temperature=1.0, seed=0) == []
    with pytest.raises(DataError, match="no token"):
        tree_sampler().sample([[1], []], 4, max_tokens=7, temperature=1.0, seed=0)


def test_weights_that_hold_nan_are_said() -> None:
    engine = tree_sampler()
    with torch.no_grad():
        engine.model.lm.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="logits are not finite"):
        engine.sample(contexts(), 1, max_tokens=3, temperature=1.0, seed=0)


def test_the_mode_of_the_model_comes_back_even_after_an_error() -> None:
    engine = tree_sampler()
    engine.model.lm.train()
    engine.sample(contexts(), 1, max_tokens=3, temperature=1.0, seed=0)
    assert engine.model.lm.training
    with torch.no_grad():
        engine.model.lm.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError):
        engine.sample(contexts(), 1, max_tokens=3, temperature=1.0, seed=0)
    assert engine.model.lm.training


def test_bfloat16_is_near_float32() -> None:
    model = place(GenerativeModel(drawn("Llama")), COMPUTE, Layout("tree", 10**6, 0, CPU))
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    how: dict[str, Any] = {"limits": Limits(64, 1.0), "token_budget": 10**6}
    half = TreeSampler(model, [], autocast=autocast, float32=False, **how)
    whole = TreeSampler(model, [], **how)
    a = flat(half.sample(TEXTS, 2, max_tokens=1, temperature=1.0, seed=0))
    b = flat(whole.sample(TEXTS, 2, max_tokens=1, temperature=1.0, seed=0))
    same = [(x, y) for x, y in zip(a, b, strict=True) if x.ids == y.ids]
    assert len(same) > len(a) / 2
    assert max(abs(x.logprobs[0] - y.logprobs[0]) for x, y in same) < 0.3


def test_a_plan_serves_every_layer() -> None:
    """Layers whose heads differ in number or size have separate tensors."""
    cache = Cache(2)
    for layer, heads, size in ((0, 2, 8), (1, 4, 16)):
        keys, values = cache.layer(layer, torch.zeros(3, heads, size))
        assert keys.shape == (2, heads, size, 64) and values.shape == (2, heads, 64, 16)
    assert cache.nbytes == 4 * 2 * 64 * (2 * (8 + 16) + 4 * (16 + 16))
