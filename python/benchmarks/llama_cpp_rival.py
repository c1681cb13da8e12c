"""llama.cpp as a rival: writes a plain Llama of transformers as a GGUF file, and runs llama.cpp's C library on it.

Needs the packages gguf and llama-cpp-python. Without llama-cpp-python the benchmark leaves this rival out.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_KINDS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}


def write_gguf(model: Any, path: Path, dtype: str) -> None:
    """Write a plain LlamaForCausalLM without its tokenizer, matrices as ``dtype``, norms as float32.

    All layers must be alike. Sizes are read from the weights, not from the configuration, which in transformers cannot
    say 24 heads at width 2048.
    """
    import gguf

    c = model.config
    D = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    first = model.model.layers[0]
    heads, groups = (p.out_features // D for p in (first.self_attn.q_proj, first.self_attn.k_proj))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(first.mlp.up_proj.out_features)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(D)
    writer.add_value_length(D)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(D)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kind = getattr(gguf.GGMLQuantizationType, _KINDS[dtype])

    def add(name: str, t: Tensor) -> None:
        values = t.detach().float().numpy()
        if t.dim() == 1:
            return writer.add_tensor(name, values)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def interleaved(weight: Tensor, heads: int) -> Tensor:  # RoPE pairs neighbours there
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    if not c.tie_word_embeddings:
        add("output.weight", model.lm_head.weight)
    for i, layer in enumerate(model.model.layers):
        a, m = layer.self_attn, layer.mlp
        add(f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight)
        add(f"blk.{i}.attn_q.weight", interleaved(a.q_proj.weight, heads))
        add(f"blk.{i}.attn_k.weight", interleaved(a.k_proj.weight, groups))
        add(f"blk.{i}.attn_v.weight", a.v_proj.weight)
        add(f"blk.{i}.attn_output.weight", a.o_proj.weight)
        add(f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight)
        add(f"blk.{i}.ffn_gate.weight", m.gate_proj.weight)
        add(f"blk.{i}.ffn_up.weight", m.up_proj.weight)
        add(f"blk.{i}.ffn_down.weight", m.down_proj.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A GGUF file in llama.cpp, its defaults kept but for the threads: greedy tokens, one sequence."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        from llama_cpp import llama_cpp as lib

        self.lib = lib
        self._silence = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._silence, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert self.model, f"llama.cpp: {path} must load"
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, params)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def step(self, tokens: list[int]) -> np.ndarray:
        """Logits after the last of these tokens, which follow all that came before."""
        array = (self.lib.llama_token * len(tokens))(*tokens)
        done = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(tokens)))
        assert done == 0, f"llama.cpp: llama_decode must return 0, got {done}"
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.vocabulary,))

    def reset(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def logits_of(path: Path, ids: Tensor, threads: int) -> Tensor:
    """[V]: what llama.cpp computes after a prompt."""
    rival = LlamaCpp(path, threads, 1024)
    found = torch.from_numpy(rival.step(ids.flatten().tolist()).copy())
    rival.close()
    return found
