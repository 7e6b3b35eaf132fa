"""LoRA in training: the computation of adapters, the trained weights, the written files, the refusals."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakePolicy
from rich.console import Console
from safetensors.torch import load_file
from test_layouts import apart, drawn
from tiny import tiny_config, tiny_dialog, tiny_folder, tiny_pairs
from torch import Tensor

from bench.harness import matrix_products
from dwrl_fast import Scorer
from dwrl_fast.batching.batch import Size
from dwrl_fast.compute import Compute
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import read_preferences
from dwrl_fast.data.mixture import Part
from dwrl_fast.embedded.tokenizer import ANSWERS, IDS
from dwrl_fast.encode import Group, Thought, closed_groups
from dwrl_fast.errors import CheckpointError, ConfigError, ModelError, UserError
from dwrl_fast.feed import open_feed
from dwrl_fast.methods import METHODS, StepMetrics
from dwrl_fast.models.adapters import FOUR_BIT, QUANTIZATION, Lora, plain
from dwrl_fast.models.model import GenerativeModel, load_generative, place
from dwrl_fast.models.pretrained import save_pretrained
from dwrl_fast.progress import Display
from dwrl_fast.ranks import Ranks
from dwrl_fast.sampling import groups
from dwrl_fast.train import run
from dwrl_fast.training.dry_run import dry_run
from dwrl_fast.training.runlog import read_metrics
from dwrl_fast.training.trainer import Trainer

pytest.importorskip("peft", reason="peft is not installed")
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 3, "lora_alpha": 4, "dtype": "fp32"}
PACKINGS = ["tree", "packed", "padded"]


def make_policy(config: TrainConfig, loud: bool = True) -> FakePolicy:
    """loud: the adapters change the outputs, as after training."""
    policy = FakePolicy(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if loud and ".lora_B." in name:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.2 * drawn)
    return policy


def of_family(folder: Path, family: str, **changes: Any) -> FakePolicy:
    """A method on a random model of `family`. Qwen2's projections have biases; Gemma 2's logits have a soft-cap."""
    card = {"method": "dwrl", "score_normalization": "vocab", "temperature": 1.0, "max_completion_length": 6}
    save_pretrained(folder / family, GenerativeModel(drawn(family)), tiny_dialog(), card)
    paths = {"model_name_or_path": str(folder / family), "tokenizer_name_or_path": str(folder / "tiny")}
    return make_policy(tiny_config(folder, **paths, **LORA | JOINT | changes))


JOINT: dict[str, Any] = {"alternate": "joint", "joint_reward": "centred"}


def test_a_policy_without_adapters_does_not_ask_for_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ConfigError("peft is not installed")

    monkeypatch.setattr("dwrl_fast.models.adapters._need_peft", absent)
    FakePolicy(tiny_config(folder))
    with pytest.raises(ConfigError, match="peft is not installed"):
        FakePolicy(tiny_config(folder, **LORA))


def groups_of(policy: FakePolicy, count: int = 3) -> list[Group]:
    return policy.rollout(read_preferences(str(policy.method.config.dataset_name)).rows[:count])[0]


def on(policy: FakePolicy, model: Any, **layout: Any) -> FakePolicy:
    """The same policy with another model or layout. It does not sample."""
    other, runtime = copy.copy(policy), policy.runtime
    other.model = model
    other.runtime = dataclasses.replace(runtime, model=model, layout=dataclasses.replace(runtime.layout, **layout))
    return other


def outcome(policy: FakePolicy, groups: list[Group], packing: Any, phase: str) -> dict[str, Tensor]:
    """Scores, log-probs, the loss, and all gradients."""
    policy = on(policy, policy.model, packing=packing)
    loss, found, metrics = policy.step(groups, phase)
    found |= {"loss": torch.tensor(loss), "scores": flat(metrics.scores(groups))}
    if isinstance(policy.model, GenerativeModel):
        found["logprobs"] = flat(policy.runtime.logprobs(groups))
    return found


def flat(values: Any) -> Tensor:
    """The numbers of nested lists as one tensor."""
    return torch.cat([flat(each) for each in values]) if isinstance(values, list) else torch.tensor([values])


def merged(policy: FakePolicy) -> FakePolicy:
    """The same method on the plain model into which the adapters merge. It trains all weights."""
    model = type(policy.model)(plain(policy.model.lm))
    return on(policy, place(model, policy.runtime.compute, policy.runtime.layout))


def expected_gradients(policy: FakePolicy, full: dict[str, Tensor]) -> dict[str, Tensor]:
    """Computed from the gradients of the merged weights: W = base + s B A, so dB = s dW A^T and dA = s B^T dW."""
    found, config = {}, policy.method.config
    scale = config.lora_alpha / config.lora_r
    parameters = dict(policy.model.named_parameters())
    for name in parameters:
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            slope = full[name.replace(".lora_A.default", "")].double()
            found[name] = scale * parameters[other].detach().double().T @ slope
            found[other] = scale * slope @ parameters[name].detach().double().T
    return found


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2"])
def test_against_the_full_rank_merge(folder: Path, family: str, packing: str) -> None:
    policy = of_family(folder, family)
    whole, groups = merged(policy), groups_of(policy)
    found, full = outcome(policy, groups, packing, "joint"), outcome(whole, groups, packing, "joint")
    frozen = {name for name, p in policy.model.named_parameters() if not p.requires_grad}
    assert not frozen & found.keys() and len(frozen) > 20
    like = {name: full[name] for name in ("logprobs", "scores", "loss")} | expected_gradients(policy, full)
    assert found.keys() == like.keys() and len(like) == 3 + 2 * 7 * 3
    far = {name: d for name, d in apart(found, like).items() if not d <= 1e-5}
    assert not far, far
    base = outcome(merged(make_policy(policy.method.config, loud=False)), groups, packing, "joint")
    assert apart(base, full)["logprobs"] > 1e-2  # the adapters change the outputs


@pytest.mark.parametrize("packing", PACKINGS)
def test_bt_against_the_full_rank_merge(folder: Path, packing: str) -> None:
    """The head is trained without adapters, in float32, and its gradient equals that of the merged model."""
    policy = make_policy(tiny_config(folder, method="bt", **LORA))
    whole, groups = merged(policy), groups_of(policy)
    found, full = outcome(policy, groups, packing, "score"), outcome(whole, groups, packing, "score")
    head = {"lm.score.modules_to_save.default.weight": full["lm.score.weight"]}
    like = {name: full[name] for name in ("scores", "loss")} | head | expected_gradients(policy, full)
    assert found.keys() == like.keys()
    far = {name: d for name, d in apart(found, like).items() if not d <= 1e-5}
    assert not far, far


@pytest.mark.parametrize(("phase", "saved"), [("score", 1), ("thought", 1), ("joint", 2)])
def test_a_frozen_head_takes_no_product_for_its_weight(folder: Path, phase: str, saved: int) -> None:
    """This saves one product in linear_logprob and one in linear_policy_loss. The rest of the step is the same."""
    policy = of_family(folder, "Qwen2")  # its head is not tied to the embedding
    (batch,) = policy.batches(groups_of(policy))
    size = Size.of(batch.groups)
    head = policy.model.lm.get_output_embeddings().weight
    taken = {}
    for trained in (False, True):
        head.requires_grad_(trained)
        taken[trained] = matrix_products(
            lambda: policy.method.loss(phase, policy.model, batch, size, StepMetrics()).backward(), unit=head.numel()
        )
        assert (head.grad is not None) == trained
    assert taken[True]["products"] - taken[False]["products"] == saved
    rows = taken[True]["rows"] - taken[False]["rows"]
    scores, tokens = len(batch.score_rows), len(batch.targets)
    assert rows <= {"score": scores, "thought": tokens, "joint": scores + tokens}[phase] and rows > 0


def make_trainer(config: TrainConfig, run: Path, held_out: int = 0) -> Trainer:
    policy = make_policy(config, loud=False)
    run.mkdir(exist_ok=True)
    feed, _ = open_feed(config, policy.dialog, Display())
    rows = read_preferences(str(config.dataset_name)).rows[:held_out]
    trainer = Trainer(config, policy.method, policy.judging, feed, rows, run, Display())
    trainer.resume()
    return trainer


@pytest.mark.parametrize("name", ["dwrl", "bt"])
def test_the_base_stays_and_checkpoints_hold_the_adapters_alone(folder: Path, name: str) -> None:
    trainer = make_trainer(tiny_config(folder, method=name, save_steps=2, **LORA), folder / "run")
    frozen = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters() if p.requires_grad}
    trainer.train()
    now = dict(trainer.policy.model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    assert all(not torch.equal(now[n], p) for n, p in trained.items())
    tensors = trainer.policy.state()
    assert {n for n in tensors if n.startswith("model.")} == {f"model.{n}" for n in trained}
    elements = sum(p.numel() for p in trained.values())
    assert sum(t.nbytes for t in tensors.values()) == 12 * elements + 4 * len(trained)  # AdamW has a step count
    files = json.loads((folder / "run" / "checkpoint-000002" / "manifest.json").read_text())["files"]
    assert files.keys() == {"shard-00001-model-00001-of-00001.safetensors", "state.json"}


def with_verdicts(requests: Any, thoughts: Any, dialog: Any) -> list[Group]:
    """`closed_groups` of thoughts that end in a verdict, A and B alternately."""

    def ended(thought: Thought, i: int) -> Thought:
        return dataclasses.replace(thought, ids=[*thought.ids[:-1], IDS[ANSWERS[i % 2]]])

    return closed_groups(requests, [[ended(one, i) for i, one in enumerate(some)] for some in thoughts], dialog)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"judge"}))
def test_every_method_trains_adapters(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if METHODS[name].template == "pairwise":  # a random model rarely writes a verdict
        monkeypatch.setattr(groups, "closed_groups", with_verdicts)
    trainer = make_trainer(tiny_config(folder, method=name, max_steps=1, save_steps=0, **LORA), folder / "run", 2)
    before = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.policy.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved or name == "grpo-point"  # this model writes no numbers that earn a reward
    assert all(".lora_" in n or ".modules_to_save." in n for n in moved)
    saved = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    trained = [p.detach() for p in trainer.policy.model.parameters() if p.requires_grad]
    assert sorted(p.numpy().tobytes() for p in trained) == sorted(p.numpy().tobytes() for p in saved.values())


@pytest.mark.parametrize("changes", [{"lora_target_modules": ("q_proj", "down_proj")}, {"method": "bt"}], ids=str)
def test_resume_to_the_bit(folder: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(folder, save_steps=1, eval_votes=0, max_steps=3, **LORA | changes)
    make_trainer(config, folder / "whole", held_out=2).train()
    path = folder / "whole" / "checkpoint-000002"
    resumed = make_trainer(dataclasses.replace(config, resume_from_checkpoint=str(path)), folder / "again", held_out=2)
    resumed.train()
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        expected, found = load_file(folder / "whole" / file), load_file(folder / "again" / file)
        assert expected.keys() == found.keys() and all(torch.equal(found[n], p) for n, p in expected.items())


def test_a_checkpoint_of_adapters_belongs_to_its_base(folder: Path) -> None:
    config = tiny_config(folder, save_steps=1, max_steps=2, **LORA)
    make_trainer(config, folder / "run").train()
    path = folder / "run" / "checkpoint-000001"
    tiny_folder(folder / "other", seed=1)
    other = dataclasses.replace(config, resume_from_checkpoint=str(path), model_name_or_path=str(folder / "other"))
    with pytest.raises(CheckpointError, match=r"the base model .* is different"):
        make_trainer(other, folder / "on")
    (folder / "tiny").rename(folder / "moved")
    moved = dataclasses.replace(other, model_name_or_path=str(folder / "moved"))
    assert make_trainer(moved, folder / "on").step == 1


def test_the_reference_is_the_model_without_its_adapters(folder: Path) -> None:
    policy = make_policy(tiny_config(folder, **LORA))
    base = load_generative(str(folder / "tiny"), None, 0).lm
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    adapted = policy.model.lm(ids).logits
    with policy.model.without_adapters(), torch.no_grad():
        assert torch.equal(policy.model.lm(ids).logits, base(ids).logits)
    assert torch.equal(policy.model.lm(ids).logits, adapted) and not torch.allclose(adapted, base(ids).logits)
    assert {n for n, p in policy.model.named_parameters() if p.requires_grad} == trained
    with (
        pytest.raises(ModelError, match=r"no adapters to switch off.*--use_peft"),
        GenerativeModel(base).without_adapters(),
    ):
        pass


def test_thoughts_are_sampled_with_the_adapters_on(folder: Path) -> None:
    policy = make_policy(tiny_config(folder, **LORA))
    groups = groups_of(policy)
    assert policy.roll_out.recomputed(groups)[1]["sampler_gap_max"] < 1e-4
    with policy.model.without_adapters():
        assert policy.roll_out.recomputed(groups)[1]["sampler_gap_max"] > 0.1


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_gradient_checkpointing_changes_nothing(folder: Path, packing: str) -> None:
    """Although the embedding is frozen, a layer that is computed again must pass its gradients on."""
    policy = of_family(folder, "Llama")
    groups = groups_of(policy)
    expected = outcome(policy, groups, packing, "joint")
    policy.model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.train()
    calls: list[int] = []
    policy.model.lm.base_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    found = outcome(policy, groups, packing, "joint")
    assert len(calls) >= 2
    assert found.keys() == expected.keys() and all(torch.equal(found[n], y) for n, y in expected.items())


def test_bfloat16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, the base is in bfloat16 and the adapters are in float32. The results are close to those in float32,
    and the merge is exact.
    """
    exact = of_family(folder, "Llama")
    groups = groups_of(exact)
    truth = outcome(exact, groups, "tree", "joint")
    monkeypatch.setattr(Lora, "base_options", lambda lora: {"dtype": torch.bfloat16})
    policy = of_family(folder, "Llama", dtype="bf16")
    dtypes = {p.requires_grad: p.dtype for p in policy.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    found = outcome(policy, groups, "tree", "joint")
    assert apart(found, truth)["logprobs"] < 0.02 and found.keys() == truth.keys()
    assert all(torch.isfinite(value).all() for value in found.values())
    base, whole = dict(policy.model.lm.named_parameters()), dict(plain(policy.model.lm).named_parameters())
    name = "model.layers.1.mlp.up_proj"
    a, b = (base[f"{name}.lora_{x}.default.weight"] for x in "AB")
    torch.testing.assert_close(
        whole[f"{name}.weight"], base[f"{name}.base_layer.weight"].float() + 4 / 3 * b @ a, rtol=1e-6, atol=1e-7
    )
    assert {p.dtype for p in whole.values()} == {torch.float32}
    scalar = make_policy(tiny_config(folder, method="bt", **LORA | {"dtype": "bf16"}))
    (batch,) = scalar.batches(groups_of(scalar))
    with scalar.runtime.compute.autocast():
        assert scalar.model(batch).dtype == torch.float32


def test_what_the_base_is_held_in() -> None:
    cpu, cuda = (Compute(torch.device(device), torch.bfloat16) for device in ("cpu", "cuda"))
    assert Lora(8, 16, (), False, cpu).base_options() == {"dtype": torch.float32}
    assert Lora(8, 16, (), False, cuda).base_options() == {"dtype": torch.bfloat16}


@pytest.mark.parametrize(("name", "rate"), [("bt", 2e-2), ("dwrl", 1e-2)])
def test_a_short_run_learns(folder: Path, name: str, rate: float) -> None:
    tiny_pairs(folder / "pairs.jsonl", 24)
    config = tiny_config(folder, method=name, max_steps=20, minibatch_size=4, learning_rate=rate, **LORA)
    result = make_trainer(config, folder / "run", held_out=24).train()
    log = read_metrics(folder / "run" / "metrics.jsonl")
    losses = [sum(row["loss"] for row in rows) / len(rows) for rows in (log[:6], log[-6:])]
    assert losses[1] < losses[0] - 0.1
    assert result["accuracy_after"] > result["accuracy_before"] + 0.1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"lora_dropout": 0.05}, r"lora_dropout = 0.05: under dropout the log-prob"),
    "4 bits, trained": ({"load_in_4bit": True, "use_peft": False}, "load_in_4bit without use_peft"),
    "nothing to train": (
        {"method": "judge", "eval_dataset_name": (Part("x"),)},
        "use_peft with method = judge, which trains nothing",
    ),
    "a drawn base": ({"model_name_or_path": None, "model_config": "x"}, "use_peft with model_config"),
    "the head": ({"lora_target_modules": ("q_proj", "lm_head")}, "lora_target_modules lm_head: LlamaFor.*up_proj"),
    "the embedding": ({"lora_target_modules": ("embed_tokens",)}, "lora_target_modules embed_tokens: Llama"),
    "no such layer": ({"lora_target_modules": ("c_attn",)}, "lora_target_modules c_attn: Llama"),
    "bt's head": ({"method": "bt", "lora_target_modules": ("score",)}, "lora_target_modules score: Llama"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(folder: Path, case: str) -> None:
    changes, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said):
        make_policy(tiny_config(folder, **LORA | changes))


@pytest.mark.parametrize(
    ("lacking", "changes", "said"),
    [
        ("peft", {}, "use_peft: peft is not installed"),
        ("bitsandbytes", {"load_in_4bit": True}, "load_in_4bit: bitsandbytes is not installed"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lacking: str, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == lacking else object())
    with pytest.raises(UserError, match=said):
        make_policy(tiny_config(folder, **LORA | changes))


FOUR = LORA | {"load_in_4bit": True}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_in_4_bits(folder: Path, dtype: str) -> None:
    """The 4-bit model computes the same as the merged model with the dequantised 4-bit weights."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    policy = make_policy(tiny_config(folder, **FOUR | {"dtype": dtype}))
    groups = groups_of(policy)
    whole = merged(policy)
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.float32}
    found, like = (outcome(each, groups, "tree", "joint") for each in (policy, whole))
    for name in ("logprobs", "scores"):
        assert (found[name] - like[name]).norm() < (1e-4 if dtype == "fp32" else 0.02) * like[name].norm()


@pytest.mark.parametrize("changes", [{"method": "dwrl", "dtype": "bf16"}, {"method": "bt"}])
def test_a_run_in_4_bits(folder: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It resumes bit for bit. Its adapters are loaded on the base in 4 bits, so they score as the merged model does."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    runs = folder / "whole", folder / "half"
    options = FOUR | changes | {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2}
    for each in runs:
        run(tiny_config(folder, output_dir=str(each), **options), Console(quiet=True))
    for path in (runs[1] / name for name in ("checkpoint-000002", "model", "adapter")):
        shutil.rmtree(path)
    (runs[1] / "result.json").unlink()
    resumed = tiny_config(folder, output_dir=str(runs[1]), resume_from_checkpoint="latest", **options)
    run(resumed, Console(quiet=True))

    def scores(path: Path) -> Tensor:
        return Scorer.from_pretrained(path).score(["3 + 4?", "3 + 5?"], ["7", "8"])

    expected = scores(runs[0] / "model")
    assert torch.equal(scores(runs[1] / "model"), expected)
    torch.testing.assert_close(scores(runs[0] / "adapter"), expected, rtol=0, atol=1e-4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(UserError, match=r"trained on its base in 4 bits\. Give the merged model.*not installed"):
        scores(runs[0] / "adapter")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "a base with load_in_4bit = False; it can be loaded only with"),
        ({"bnb_4bit_quant_type": "fp4"}, "quant_type = fp4; it can be loaded only with bnb_4bit_quant_type = nf4"),
        ({"bnb_4bit_use_double_quant": True}, "use_double_quant = True; .* Merge them with the tool"),
        ({"llm_int8_skip_modules": ["up_proj"]}, "skip_modules = .'up_proj'."),
        (None, "cannot be read as a folder of adapters: quantization_config.json: Expecting value.*Copy it again"),
    ],
)
def test_a_base_quantised_in_another_way_is_refused(tmp_path: Path, written: dict[str, Any] | None, said: str) -> None:
    """The adapters were fitted to its rounding."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    (tmp_path / QUANTIZATION).write_text(json.dumps(FOUR_BIT | written) if written else "")
    with pytest.raises(ModelError, match=rf"{QUANTIZATION}: .*{said}" if written else said):
        load_generative(str(tmp_path), None, 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_dry_run_with_torchrun_refuses_4_bits_as_training_does(folder: Path, processes: int) -> None:
    """Also one process, and where the weights are on the hub."""
    (folder / "tiny" / "model.safetensors").unlink()
    config = tiny_config(folder, **FOUR)
    with pytest.raises(UserError, match="weights in 4 bits are not sharded"):
        dry_run(config, Console(quiet=True), Ranks(count=processes, mesh=object()))
