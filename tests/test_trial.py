"""Before training, a trial finds what a model can do: on a tree, padded, in sampling, merged and saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from drawn_groups import make_group, make_sequence
from safetensors.torch import load_file, save_file
from test_layouts import COMPUTE, CPU, SHARED, drawn
from tiny import tiny_dialog, tiny_folder, tiny_pairs

from dwrl_fast import Scorer, train
from dwrl_fast.batching.layout import Layout
from dwrl_fast.errors import ConfigError, ModelError, NotFiniteError, UserError
from dwrl_fast.models import trial
from dwrl_fast.models.adapters import Lora, add_adapters, plain
from dwrl_fast.models.model import GenerativeModel, check_positions, load_generative, place
from dwrl_fast.models.pretrained import save_pretrained, try_saving
from dwrl_fast.sampling.transformers import TransformersSampler

SMALL: dict[str, Any] = SHARED | {"vocab_size": 64, "num_hidden_layers": 2, "eos_token_id": 2, "pad_token_id": 0}
STATES = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
STATES |= {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
LATENT |= {"first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3},
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | STATES | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": STATES,
    "deepseek_v3": LATENT,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "bloom": {"n_head": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "nemotron": {},
    "modernbert-decoder": {"global_attn_every_n_layers": 1, "bos_token_id": 1},
    "recurrent_gemma": {},
    "seed_oss": {"residual_dropout": 0.1, "attention_dropout": 0.1},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "qwen2_moe": {},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "router_jitter_noise": 0.3},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2}
    | {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}}
    | {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.3}},
    "phimoe": {},
    "afmoe": {"num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def made(kind: str, **changes: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **SMALL | KINDS[kind] | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def placed(lm: Any, packing: Any = "tree", **how: Any) -> GenerativeModel:
    return place(GenerativeModel(lm), COMPUTE, Layout(packing, 1, 0, CPU), **how)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "convolutions": (lambda: made("lfm2"), "layers of kind conv"),
    "linear attention": (lambda: made("qwen3_5_text"), "layers of kind linear_attention"),
    "linear attention and experts": (lambda: made("qwen3_next"), "layers of kind linear_attention"),
    "latent attention": (lambda: made("deepseek_v3"), "tree_attention: v is"),
    "positions without position ids": (lambda: made("bloom"), "registry|states differ"),
    "a mask of its own": (lambda: made("nemotron"), "it raises RuntimeError"),
}


@pytest.mark.parametrize("model", REFUSED)
def test_what_cannot_run_on_a_tree_is_refused_by_name_and_runs_as_advised(model: str) -> None:
    make, said = REFUSED[model]
    lm = make()
    name = type(lm).__name__
    with pytest.raises(
        ModelError, match=rf"{name} cannot run on a tree.*({said}).*; use --packing padded, which works"
    ):
        placed(lm)
    placed(make(), "padded")


def test_what_no_layout_computes_is_refused_without_a_remedy() -> None:
    """In this layer every token sees the last token of the row."""
    lm = drawn("Llama")
    layer = lm.base_model.layers[0]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: forward(x + x[:, -1:])
    with pytest.raises(
        ModelError,
        match=r"LlamaForCausalLM cannot be used here, because it works in no layout: .*padded: .*other model",
    ):
        placed(lm)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_next", "lfm2"])
def test_layers_with_a_state_are_sampled_from(kind: str) -> None:
    """Contexts of several lengths have several thoughts each, and some thoughts end early."""
    lm = made(kind)
    contexts = [[5, 6, 7, 8, 9], [7, 8, 9], [11]]
    stops = list(range(20, 40))
    found = TransformersSampler(lm, stops, 0, batch_size=12).sample(contexts, 4, max_tokens=6, temperature=1.0, seed=1)
    sizes = set()
    for context, thoughts in zip(contexts, found, strict=True):
        for thought in thoughts:
            sizes.add(len(thought.ids))
            ids = torch.tensor([[*context, *thought.ids]])
            with torch.no_grad():
                logprobs = lm(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            alone = logprobs[len(context) - 1 : -1].gather(-1, ids[0, len(context) :, None])[:, 0]
            # A step and a whole sequence compute the state by different formulas, with sums in another order. The
            # difference was 2e-5 on one machine. A state that includes padding, as in Mamba, differs by 0.5.
            torch.testing.assert_close(torch.tensor(thought.logprobs), alone, rtol=0, atol=1e-4)
    assert len(sizes) > 2


def test_a_sampler_that_says_something_else_is_refused() -> None:
    """Mamba's state includes the padding on the left."""
    said = r"MambaForCausalLM cannot write thoughts here: log-probs in sampling differ by .* a method without thoughts"
    with pytest.raises(ModelError, match=rf"{said} with --packing padded .gram, genrm, sft and dpo"):
        placed(made("mamba"))
    placed(made("mamba"), "padded", thinks=False)


def test_the_trial_finds_what_no_config_tells() -> None:
    """In this layer every token sees the token before it, even if that belongs to another thought."""
    lm = drawn("Llama")
    layer = lm.base_model.layers[0]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: forward(x + torch.cat([x[:, :1], x[:, :-1]], 1))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot run on a tree.*differ by.*--packing padded"):
        placed(lm, thinks=False)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot write thoughts here: .*differ by"):
        placed(lm, "padded")  # the cache does not have that token


def test_weights_that_are_not_numbers_are_no_fault_of_the_layout() -> None:
    lm = made("llama")
    with torch.no_grad():
        lm.model.norm.weight[3] = torch.nan
    with pytest.raises(
        NotFiniteError,
        match=r"LlamaForCausalLM cannot be used: its weights hold NaN or infinities, in model\.norm\.weight\.",
    ):
        placed(lm)


LIMIT = 24
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": LIMIT,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
}


def long_llama(rope: str) -> Any:
    return made("llama", rope_parameters=ROPES[rope], max_position_embeddings=LIMIT if rope == "dynamic" else 96)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("packing", ["tree", "packed", "padded"])
def test_rotary_factors_do_not_depend_on_the_batch(rope: str, packing: Any) -> None:
    """Sequences up to the length at which they would are computed. Longer ones are refused."""
    model = placed(long_llama(rope), packing)
    layout = Layout(packing, 10**6, 0, CPU)

    def scores(*sizes: int) -> torch.Tensor:
        rows = [make_sequence([3, *range(5, 4 + size)], 1, size) for size in sizes]
        (batch,) = layout.batches([make_group([[row] for row in rows])])
        with torch.no_grad():
            return model(batch, tokens=False).score

    torch.testing.assert_close(scores(7, LIMIT)[0], scores(7)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match=rf"of {LIMIT + 1} tokens: the rotary .* up to {LIMIT} tokens"):
        scores(7, LIMIT + 1)
    check_positions(model, LIMIT)
    with pytest.raises(ModelError, match=r"Lower --max_length and --max_completion_length to 24 tokens"):
        check_positions(model, LIMIT + 1)
    sampler = TransformersSampler(model.lm, [], 0, batch_size=2)
    assert len(sampler.sample([[3, 4]], 1, max_tokens=LIMIT - 1, temperature=1.0, seed=0)[0][0].ids) == LIMIT - 1
    with pytest.raises(ModelError, match="the rotary embedding"):
        sampler.sample([[3, 4]], 1, max_tokens=LIMIT, temperature=1.0, seed=0)


LORA = Lora(4, 8, (), False, COMPUTE)


@pytest.mark.parametrize(
    "kind", ["llama", "mixtral", "qwen3_moe", "qwen3_next", "deepseek_v3", "gpt2", "qwen3_5_text", "lfm2"]
)
def test_default_adapters_merge_and_save(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = made(kind)
    base.save_pretrained(tmp_path / "base")
    lm = load_generative(str(tmp_path / "base"), None, 0).lm.eval()
    add_adapters(lm, LORA, str(tmp_path / "base"))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=noise)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected, before = lm(ids).logits, base(ids).logits
        apart = (plain(lm).eval()(ids).logits - expected).abs().amax()
    # Merging rounds every weight to float32 again, which changes it by 6e-8 of its value. Layers that normalise small
    # states (gated linear attention) amplify this a thousandfold. Without merging, the difference would be larger.
    assert apart < 1e-3 * (expected - before).abs().amax(), (apart, (expected - before).abs().amax())
    assert ("several experts in one tensor" in caplog.text) == (kind not in ("llama", "gpt2", "qwen3_5_text", "lfm2"))
    save_pretrained(tmp_path / "model", GenerativeModel(lm), tiny_dialog(), {})  # this also reads both folders again
    assert (tmp_path / "adapter").is_dir()


def test_targets_that_cannot_be_merged_are_refused_before_training() -> None:
    targets = ("gate_proj", "up_proj", "down_proj")
    with pytest.raises(ConfigError, match=r"experts in one tensor of DeepseekV3.*Choose from .*q_a_proj"):
        add_adapters(made("deepseek_v3"), Lora(4, 8, targets, False, COMPUTE), "base")
    with pytest.raises(ConfigError, match="peft refuses MambaForCausalLM"):
        add_adapters(made("mamba"), LORA, "base")


def test_what_cannot_be_saved_is_known_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder(tmp_path / "tiny")
    model = load_generative(str(tmp_path / "tiny"), None, 0)
    (tmp_path / "run").mkdir()
    try_saving(tmp_path / "run", model, tiny_dialog(), {})
    assert list((tmp_path / "run").iterdir()) == []

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.lm, "save_pretrained", full)
    with pytest.raises(ConfigError, match=r"model can.* be saved in .*run: .*No space left on device"):
        try_saving(tmp_path / "run", model, tiny_dialog(), {})
    assert list((tmp_path / "run").iterdir()) == []


def test_a_save_that_is_not_the_model_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder(tmp_path / "tiny")
    before = (tmp_path / "tiny" / "model.safetensors").read_bytes()
    model = load_generative(str(tmp_path / "tiny"), None, 0)
    write = model.lm.save_pretrained

    def another(folder: Path, **options: Any) -> None:
        with torch.no_grad():
            model.lm.model.layers[1].mlp.up_proj.weight.mul_(-1)
            write(folder, **options)
            model.lm.model.layers[1].mlp.up_proj.weight.mul_(-1)

    monkeypatch.setattr(model.lm, "save_pretrained", another)
    with pytest.raises(ModelError, match=r"saved in .*tiny.part is not the model that was trained: .* differs by"):
        save_pretrained(tmp_path / "tiny", model, tiny_dialog(), {})
    assert (tmp_path / "tiny" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "tiny.part" / "model.safetensors").is_file()
    with pytest.raises(ModelError):
        try_saving(tmp_path, model, tiny_dialog(), {})


def test_a_dry_run_tries_a_model_that_is_at_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder(tmp_path / "tiny")
    tiny_pairs(tmp_path / "pairs.jsonl")
    before = sorted(tmp_path.rglob("*"))
    given = ["--dry_run", "--model_name_or_path", f"{tmp_path}/tiny", "--dataset_name", f"{tmp_path}/pairs.jsonl"]
    given += ["--output_dir", f"{tmp_path}/run"]
    train.main([*given, "--use_peft"])
    assert "tried on a few tokens: its layout, sampling, merging, saving; all of it works" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, tmp_path / "tiny" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights hold NaN"):
        train.main(given)


def test_a_head_of_more_than_one_matrix_is_refused() -> None:
    """The logits of ModernBERT's decoder come from a dense layer and a norm before the output embedding."""
    said = (
        r"ModernBertDecoderForCausalLM cannot be used here: on a few tokens its logits differ by .* Use another model"
    )
    for packing in ("tree", "padded"):
        with pytest.raises(ModelError, match=said):
            placed(made("modernbert-decoder"), packing, thinks=False)


def test_every_soft_cap_of_logits_is_read() -> None:
    model = placed(made("recurrent_gemma", lru_width=32, attention_window_size=8), "padded", thinks=False)
    assert model.softcap == 30.0
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.mul_(100)  # logits of the size of the soft-cap
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        states = model.lm.base_model(ids, use_cache=False).last_hidden_state[0]
        expected = model.lm(ids, use_cache=False).logits[0]
    assert expected.abs().amax() > 10
    torch.testing.assert_close(model.head(states, states[:0]).logits(states), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["seed_oss", "opt", "gpt_bigcode", "gpt2", "mixtral", "minimax_m2", "dbrx"])
def test_dropout_and_noise_of_every_form_are_off_in_training(kind: str, tmp_path: Path) -> None:
    """Seed-OSS and OPT apply it as a function of an attribute, GPT-BigCode passes it to the attention. Routers multiply
    their inputs by noise.
    """
    made(kind).save_pretrained(tmp_path / kind)
    model = load_generative(str(tmp_path / kind), None, 0)
    lm = placed(model.lm).lm
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(lm.train()(ids).logits, lm.eval()(ids).logits, rtol=0, atol=0)


def test_noise_in_training_that_cannot_be_switched_off_is_refused() -> None:
    lm = made("llama")
    layer = lm.base_model.layers[0]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: forward(torch.nn.functional.dropout(x, 0.1, layer.training))
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be used here: in training mode its states differ"):
        placed(lm)
    placed(lm, trains=False)


def test_what_is_noise_only_in_training_can_be_evaluated_unchanged() -> None:
    """PhiMoE draws its experts in training. Its router_jitter_noise also decides in evaluation which of them count."""
    kind = {"num_local_experts": 4, "router_jitter_noise": 0.2, "input_jitter_noise": 0.2, "sliding_window": None}
    lm, ids = made("phimoe", **kind), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = lm(ids).logits
        without = made("phimoe", **kind | {"router_jitter_noise": 0.0})(ids).logits
        assert not torch.allclose(before, without)
        torch.testing.assert_close(placed(lm, trains=False).lm(ids).logits, before)
    with pytest.raises(ModelError, match=r"in training mode .* it can only be evaluated\. Use another model"):
        placed(lm)


def test_only_what_is_trained_is_tried_in_training_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = tiny_pairs(tmp_path / "pairs.jsonl")
    monkeypatch.setattr(trial, "_training_fault", lambda *_: "it trains otherwise")
    given = ["--dry_run", "--model_name_or_path", str(tiny_folder(tmp_path / "tiny"))]
    with pytest.raises(UserError, match="it trains otherwise"):
        train.main([*given, "--dataset_name", str(pairs)])
    train.main([*given, "--method", "judge", "--eval_dataset_name", str(pairs)])
    Scorer.from_pretrained(tmp_path / "tiny")


def test_a_config_that_does_not_compute_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Qwen3MoeForCausalLM cannot compute even a short sequence: .*config\.json"):
        placed(made("qwen3_moe", num_experts_per_tok=8))


def test_a_window_in_the_mask_alone_is_not_lost() -> None:
    """Qwen2-MoE does not pass its window to its attention."""
    sliding = EXPERTS | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    sliding |= {"shared_expert_intermediate_size": 16}
    with pytest.raises(
        ModelError, match=r"cannot run on a tree.*sliding window in its mask alone.*padded, which works"
    ):
        placed(made("qwen2_moe", **sliding))
    model = placed(made("qwen2_moe", **sliding), "padded")
    assert not model.shares_cache and "tree" not in model.lm.config._attn_implementation
    assert placed(made("qwen2_moe", **sliding | {"use_sliding_window": False})).shares_cache


def test_an_attention_that_names_its_mask_runs_on_a_tree() -> None:
    """AFMoE calls its attention with names only."""
    assert placed(made("afmoe")).shares_cache


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_end(kind: str) -> None:
    model = placed(made(kind, max_position_embeddings=LIMIT))
    assert not check_positions(model, LIMIT)
    with pytest.raises(
        ModelError, match=f"may reach {LIMIT + 1} tokens, but the model has positions for {LIMIT}, each"
    ):
        check_positions(model, LIMIT + 1)
    assert check_positions(placed(made("llama", max_position_embeddings=LIMIT)), LIMIT + 1)
