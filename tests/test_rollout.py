"""Sampling uses only the model's own distribution, and its recorded log-probs are those of the trainer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_dialog, tiny_model
from transformers import GenerationConfig

from dwrl_fast.batching.padded import padded_batch
from dwrl_fast.data import Preference
from dwrl_fast.dialog import Dialog
from dwrl_fast.encode import Group, Thought, response_requests
from dwrl_fast.models.backbone import attend_over_trees
from dwrl_fast.ops import linear_logprob
from dwrl_fast.sampling import Limits, Sampler, TransformersSampler, TreeSampler, sample_groups
from dwrl_fast.sampling.sampler import request_key

ROWS = [
    Preference(({"role": "user", "content": "3 1 4"},), ("6", "2 2 2 2"), source="x:1"),
    Preference(({"role": "user", "content": "1"},), ("1", "0"), source="x:2"),
    Preference(({"role": "user", "content": "5 6 5 6 5 6 5 6"},), ("9 9", "0"), source="x:3"),
]


Make = Callable[..., Any]


def tree_sampler(batch_size: int = 64, token_budget: int = 10**6, cache_gib: float = 1.0) -> TreeSampler:
    model = tiny_model()
    attend_over_trees(model.lm)
    limits = Limits(batch_size, cache_gib)
    return TreeSampler(model, tiny_dialog().stop_ids, limits=limits, token_budget=token_budget)


def plain_sampler(batch_size: int = 64) -> TransformersSampler:
    dialog = tiny_dialog()
    return TransformersSampler(tiny_model().lm, dialog.stop_ids, dialog.pad_id, batch_size=batch_size)


@pytest.fixture(params=[plain_sampler, tree_sampler], ids=["one by one", "over a cache"])
def sampler(request: pytest.FixtureRequest) -> Make:
    """A function that creates an engine, for each kind of engine."""
    return request.param  # type: ignore[no-any-return]


def contexts() -> list[list[int]]:
    dialog = tiny_dialog()
    return [dialog.context(row.prompt, response).ids for row in ROWS for response in row.responses]


def sample(engine: Sampler, n: int = 12, temperature: float = 1.0, seed: int = 0) -> list[list[Thought]]:
    return engine.sample(contexts(), n, max_tokens=7, temperature=temperature, seed=seed)


def sampled(rows: list[Preference], dialog: Dialog, engine: Sampler, n: int, **how: Any) -> list[Group]:
    return sample_groups(response_requests(rows, dialog), dialog, engine, n, **how)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_the_whole_sequence(sampler: Make, temperature: float) -> None:
    """A padded, cached, shrinking batch gives the same as one plain forward pass per thought."""
    engine, lm = sampler(), tiny_model().lm
    ended = set()
    for context, thoughts in zip(contexts(), sample(engine, temperature=temperature), strict=True):
        for thought in thoughts:
            logits = lm(torch.tensor([context + thought.ids])).logits[0, len(context) - 1 : -1]
            logp = (logits / (temperature or 1.0)).log_softmax(-1)
            expected = logp.gather(-1, torch.tensor(thought.ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(thought.logprobs), expected, rtol=0, atol=2e-5)
            if temperature == 0:
                assert thought.ids == logits.argmax(-1).tolist()
            assert thought.ended == (thought.ids[-1] in tiny_dialog().stop_ids)
            assert not set(thought.ids[:-1]) & set(tiny_dialog().stop_ids)
            ended.add(thought.ended)
    assert temperature == 0 or ended == {True, False}, (
        "the test must see both thoughts that end and thoughts that are cut"
    )


def test_what_is_recorded_is_what_the_trainer_computes(sampler: Make) -> None:
    engine, dialog, model = sampler(), tiny_dialog(), tiny_model()
    groups = sampled(ROWS, dialog, engine, 4, max_tokens=7, temperature=0.7, seed=0)
    batch = padded_batch(groups, dialog.pad_id, torch.device("cpu"))
    with torch.no_grad():
        head = model(batch, tokens=True)
        fresh = linear_logprob(head.token, head.weight, batch.targets, temperature=0.7)
    torch.testing.assert_close(fresh, batch.old_logprob, rtol=0, atol=2e-5)


@pytest.mark.parametrize("poison", [{"top_k": 1}, {"top_p": 0.1}, {"repetition_penalty": 3.0}, {"min_p": 0.5}])
def test_generation_config_changes_nothing(sampler: Make, poison: dict[str, float]) -> None:
    engine, poisoned = sampler(), sampler()
    lm = poisoned.model.lm if isinstance(poisoned, TreeSampler) else poisoned.lm
    lm.generation_config = GenerationConfig(do_sample=True, temperature=0.1, forced_eos_token_id=3, **poison)
    assert sample(engine) == sample(poisoned)


def test_first_tokens_follow_the_softmax(sampler: Make) -> None:
    engine, n = sampler(batch_size=20_000), 20_000
    context = contexts()[0]
    first = torch.tensor([t.ids[0] for t in engine.sample([context], n, max_tokens=1, temperature=0.5, seed=1)[0]])
    logits = tiny_model().lm(torch.tensor([context])).logits[0, -1]
    expected = (logits / 0.5).softmax(-1).detach() * n
    seen = torch.bincount(first, minlength=len(expected)).float()
    common = expected > 5
    chi2 = ((seen - expected)[common].square() / expected[common]).sum()
    degrees = int(common.sum()) - 1
    assert degrees >= 2 and chi2 < degrees + 4 * (2 * degrees) ** 0.5
    assert seen[~common].sum() <= expected[~common].sum() + 20


def test_batches_change_no_greedy_thought(sampler: Make) -> None:
    whole, small = sample(sampler(), 1, 0.0), sample(sampler(batch_size=2), 1, 0.0)
    assert [t.ids for [t] in whole] == [t.ids for [t] in small]


def test_a_thought_does_not_depend_on_the_batch(sampler: Make) -> None:
    """It does not depend on the batch's size, its order, or other requests. Products round differently in another
    batch, so one thought of 72 may differ. Equal thoughts have the same log-probs.
    """
    whole = sample(sampler())
    reversed_ = sampler().sample(contexts()[::-1], 12, max_tokens=7, temperature=1.0, seed=0)[::-1]
    alone = [sampler().sample([one], 12, max_tokens=7, temperature=1.0, seed=0)[0] for one in contexts()]
    fewer = sampler().sample(contexts(), 5, max_tokens=7, temperature=1.0, seed=0)
    for other in (*(sample(sampler(batch_size=size)) for size in (1, 7, 30)), reversed_, alone, fewer):
        pairs = [(a, b) for x, y in zip(whole, other, strict=True) for a, b in zip(x, y, strict=False)]
        assert len(pairs) in (72, 30)
        same = [(a, b) for a, b in pairs if a.ids == b.ids]
        assert len(pairs) - len(same) <= 1
        for a, b in same:
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5) and a.ended == b.ended


def test_thoughts_about_one_context_differ_from_one_another(sampler: Make) -> None:
    for thoughts in sample(sampler()):
        assert len({tuple(thought.ids) for thought in thoughts}) > 6


def test_keys_follow_seed_context_and_index() -> None:
    asked = [(0, [1, 2], 0), (1, [1, 2], 0), (0, [1, 2], 1), (0, [12], 0), (0, [2, 1], 0), (0, [1], 2), (10, [1], 0)]
    keys = [request_key(*each) for each in asked]
    assert len(set(keys)) == len(keys) and all(-(2**63) <= key < 2**63 for key in keys)
    assert keys == [request_key(seed, tuple(context), index) for seed, context, index in asked]


def test_a_seed_repeats_itself_and_another_does_not(sampler: Make) -> None:
    assert sample(sampler(), seed=3) == sample(sampler(), seed=3) != sample(sampler(), seed=4)


def test_thoughts_stand_in_the_sequence_as_sampled(sampler: Make) -> None:
    dialog = tiny_dialog()
    groups = sampled(ROWS, dialog, sampler(), 3, max_tokens=5, temperature=1.0, seed=0)
    drawn = iter(sampler().sample(contexts(), 3, max_tokens=5, temperature=1.0, seed=0))
    for group in groups:
        for sequences, kept in zip(group.sequences, group.thoughts, strict=True):
            for sequence, one, thought in zip(sequences, kept, next(drawn), strict=True):
                assert sequence.ids[sequence.thought] == one.ids == thought.ids
                assert one.logprobs == pytest.approx(thought.logprobs)


def test_groups_of_any_shape_share_a_batch(sampler: Make) -> None:
    """Groups with K = 3 and K = 2, and absent thoughts. The grid masks what is absent."""
    dialog = tiny_dialog()
    groups = sampled(ROWS, dialog, sampler(), 2, max_tokens=3, temperature=1.0, seed=0)
    three = Preference(ROWS[0].prompt, ("1", "2", "3"))
    wide = sampled([three], dialog, sampler(), 3, max_tokens=3, temperature=1.0, seed=0)
    batch = padded_batch([*groups, *wide], dialog.pad_id, torch.device("cpu"))
    assert batch.slots.shape == (4, 3, 3) and batch.valid.sum() == 3 * 4 + 9
    assert not batch.valid[0, 2].any() and not batch.valid[0, 0, 2] and batch.valid[3].all()
    order = batch.grid(torch.arange(21))[batch.valid]
    assert order.tolist() == list(range(21)), "[valid] of a grid must give the sequences back in order"
    assert len(batch.score_rows) == 21


def test_rows_for_the_head_are_the_right_ones(sampler: Make) -> None:
    dialog = tiny_dialog()
    groups = sampled(ROWS, dialog, sampler(), 2, max_tokens=4, temperature=1.0, seed=0)
    batch = padded_batch(groups, dialog.pad_id, torch.device("cpu"))
    sequences = [sequence for group in groups for sequence in group.flat]
    width = batch.input_ids.shape[1]
    flat = batch.input_ids.flatten()
    assert flat[batch.token_rows + 1].tolist() == batch.targets.tolist()
    assert flat[batch.score_rows].tolist() == [sequence.ids[-1] for sequence in sequences]
    assert (batch.score_rows // width).tolist() == list(range(len(sequences)))
    assert batch.targets.tolist() == [i for sequence in sequences for i in sequence.ids[sequence.thought]]
    assert torch.bincount(batch.segment_ids).tolist() == batch.lengths.tolist()


def test_padding_changes_no_hidden_state(sampler: Make) -> None:
    dialog, model = tiny_dialog(), tiny_model()
    groups = sampled(ROWS, dialog, sampler(), 2, max_tokens=4, temperature=1.0, seed=0)
    with torch.no_grad():
        together = model(padded_batch(groups, dialog.pad_id, torch.device("cpu")), tokens=True)
        alone = [
            model(padded_batch([Group(g.preference, [[s]], [[t]])], dialog.pad_id, torch.device("cpu")), tokens=True)
            for g in groups
            for row, thoughts in zip(g.sequences, g.thoughts, strict=True)
            for s, t in zip(row, thoughts, strict=True)
        ]
    torch.testing.assert_close(together.score, torch.cat([h.score for h in alone]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.token, torch.cat([h.token for h in alone]), rtol=1e-5, atol=1e-5)
