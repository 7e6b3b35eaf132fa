"""A tiny Llama as a GGUF file with 8-bit matrices, and the model that must result from reading it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from chats import CHATML
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

Q8 = gguf.GGMLQuantizationType.Q8_0
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Y e", "Ye s", "N o"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=4096,
    initializer_range=0.2,
    tie_word_embeddings=True,
    rms_norm_eps=1e-6,
    bos_token_id=None,
    eos_token_id=2,
)


def write_gguf(path: Path, *, architecture: str = "llama", pre: str = "gpt-2", seed: int = 0) -> Any:
    """Write the file, and return the model that must result from reading it, with weights rounded to 8 bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = LlamaForCausalLM(CONFIG)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])  # 3: control
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)
    for name, parameter in lm.named_parameters():
        parameter.data = torch.from_numpy(_add(writer, _named(name), parameter.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return lm


def _named(name: str) -> str:
    """llama.cpp's name for a weight of transformers."""
    name = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers", "blk")


def _add(writer: gguf.GGUFWriter, name: str, weight: np.ndarray) -> np.ndarray:
    """Write a tensor, and return what must be read. llama.cpp interleaves the two halves of a head's rotation."""
    if weight.ndim == 1:
        writer.add_tensor(name, weight)
        return weight
    heads = {"attn_q": CONFIG.num_attention_heads, "attn_k": CONFIG.num_key_value_heads}.get(name.split(".")[-2], 0)
    stored = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape) if heads else weight
    blocks = gguf.quants.quantize(np.ascontiguousarray(stored), Q8)
    writer.add_tensor(name, blocks, raw_dtype=Q8)
    read = gguf.quants.dequantize(blocks, Q8)
    return read.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape) if heads else read
