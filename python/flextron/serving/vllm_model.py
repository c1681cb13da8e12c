"""An elastic checkpoint as a model of vLLM: our layers at each request's widths, its attention on its paged cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from vllm import _custom_ops
from vllm.config import VllmConfig
from vllm.envs import VLLM_CPU_ATTN_SPLIT_KV
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from flextron.artefacts.directory import ElasticDirectory
from flextron.nn.elastic_attention import ElasticAttention
from flextron.nn.projection import linear
from flextron.nn.protocol import Elastic
from flextron.nn.rotary import rotary_of
from flextron.serving.batch import Batch
from flextron.serving.plugin import directory_of, offer_of
from flextron.serving.served import serve

_UNKNOWN_ROPE = ("dynamic", "longrope")  # their tables depend on the longest position of a call


class ElasticForCausalLM(nn.Module):
    """Made by vLLM's registry; its interface is vLLM's.

    Our own loader reads the checkpoint, with its checksums, and our own modules run it. Only attention is vLLM's: the
    one thing that a layer does with other tokens than its own.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        dtype, device = vllm_config.model_config.dtype, torch.empty(0).device  # vLLM sets both before
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # of tables that transformers makes, as elsewhere
        try:
            with ElasticDirectory.open(directory_of(vllm_config)) as checkpoint:
                self.elastic: Any = checkpoint.model(dtype, device)
        finally:
            torch.set_default_dtype(default)
        _check(self.elastic)
        offer = offer_of(vllm_config)
        self.batch = Batch(offer.config, device, offer.pace())
        serve(offer, self.batch)
        self.whole = self.batch.whole(offer.widest)
        self.kind = self.elastic.anatomy.decoder_kind(self.elastic.config)
        self.narrow: dict[Any, Any] = {}
        self.paged = nn.ModuleDict()
        for i, (attention, _) in enumerate(self.elastic.layers_of()):
            heads = offer.widest.heads[i]
            if heads:
                self.paged[str(i)] = _attention(
                    vllm_config, self.elastic, attention, heads, f"{prefix}layers.{i}.attn"
                )
                attention.host = Paged(self.paged[str(i)], self.narrow)
        if device.type == "cpu":
            _fuse_norms(self.elastic)
        self.first = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)  # a mask that hides nothing

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.elastic.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """input_ids and positions [N] of all requests, one after another -> the last hidden states [N, K]."""
        self.narrow.clear()
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        given = {name: None if value is None else value[None] for name, value in given.items()}
        with self.elastic.settings.block(self._setting(len(positions))):
            out = self.elastic.base_model(
                **given, position_ids=positions[None], attention_mask=self.first, use_cache=False
            )
        return out.last_hidden_state[0]

    def _setting(self, tokens: int) -> Any:
        metadata = get_forward_context().attn_metadata
        if not metadata:  # vLLM measures memory
            return self.whole
        starts = next(iter(metadata.values())).query_start_loc
        return self.batch.setting(starts.diff().tolist(), tokens)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        head, scale = self.elastic.lm_head, self.kind.get("logit_scale", 1.0)
        on_cpu = hidden_states.device.type == "cpu"  # where it takes half the time of the vendor's product
        logits = (
            linear(head, hidden_states, head.in_features, head.out_features)
            if on_cpu
            else head(hidden_states)
        )
        logits = logits if scale == 1 else logits * scale
        cap = self.kind.get("logit_cap")
        return logits if cap is None else cap * (logits / cap).tanh()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing is left to load. vLLM says how long it took from the first tensor on, so that is asked for."""
        next(iter(weights), None)


def _fuse_norms(model: Elastic) -> None:
    """Let vLLM's op compute Llama's norms in float32; transformers' modules take six, a tenth of a narrow step."""
    if not model.anatomy.is_llama(model.config) or model.dtype != torch.float32:
        return  # in 16 bits the op rounds once where transformers does twice
    for module in model.base_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(_rms_norm, module.weight, module.variance_epsilon)


def _rms_norm(weight: Tensor, eps: float, x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _custom_ops.rms_norm(out, x.contiguous(), weight, eps)
    return out


def _check(model: Elastic) -> None:
    """Refuse what vLLM's attention, or a row of several requests, would compute otherwise."""
    anatomy, rotary = model.anatomy, rotary_of(model, model.anatomy)
    kind = getattr(rotary, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else (kind,)
    for what, is_there in (
        ("attention sinks", bool(anatomy.sinks)),
        ("positions that it counts itself", anatomy.counted),
        ("rotary tables that depend on the longest sequence", any(each in _UNKNOWN_ROPE for each in kinds)),
    ):
        if is_there:
            raise NotImplementedError(
                f"flextron: a model served by vLLM must have no {what}, got a {model.elastic.family}"
            )


def _attention(
    vllm_config: VllmConfig, model: Elastic, attention: ElasticAttention, heads: int, prefix: str
) -> Attention:
    """vLLM's attention of a layer, whose cache has the groups that the widest request may need."""
    c = model.elastic
    groups = c.kv_heads(heads)
    queries = c.query_heads(heads) if c.unit == "kv_group" else heads * groups
    return Attention(
        queries,
        c.head_dim,
        attention.scaling,
        num_kv_heads=groups,
        cache_config=vllm_config.cache_config,
        per_layer_sliding_window=attention.window,
        logits_soft_cap=attention.softcap,
        prefix=prefix,
    )


class Paged:
    """vLLM's attention over the groups that its batch needs; takes the place of an `ElasticAttention`'s own.

    On a CPU its kernel is handed the first groups of its cache, and reads no others. Another backend is handed zeros
    for those that are missing, and computes them.

    Args:
        layer: vLLM's.
        narrow: what one forward shares: the kernel's plan for each number of heads.
    """

    def __init__(self, layer: Any, narrow: dict[Any, Any]) -> None:
        self.layer, self.narrow = layer, narrow

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, used: int) -> Tensor:
        """q [1, N, H, D] over the first ``used`` groups of k and v [1, N, G, D], at their positions -> [N, H, D].

        All groups of k and v are stored.
        """
        q, k, v = q[0], k[0], v[0]
        layer, (N, H, D), G = self.layer, q.shape, k.shape[1]
        metadata = get_forward_context().attn_metadata
        if isinstance(layer.impl, CPUAttentionBackendImpl) and metadata:
            return self._on_cpu(q, k, v, used, metadata[layer.layer_name])
        if (layer.num_heads, layer.num_kv_heads) == (H, G):
            return layer(q, k, v, output_shape=torch.Size((N, H * D))).view(N, H, D)
        per, each = H // max(used, 1), layer.num_heads // layer.num_kv_heads
        queries = q.new_zeros(N, layer.num_kv_heads, each, D)
        queries[:, :used, :per] = q.view(N, used, per, D)
        more = (0, 0, 0, layer.num_kv_heads - G)
        out = layer(
            queries.flatten(1, 2),
            pad(k, more),
            pad(v, more),
            output_shape=torch.Size((N, layer.num_heads * D)),
        )
        return out.view(N, -1, each, D)[:, :used, :per].flatten(1, 2)

    def _on_cpu(self, q: Tensor, k: Tensor, v: Tensor, used: int, metadata: CPUAttentionMetadata) -> Tensor:
        layer, H, G = self.layer, q.shape[1], k.shape[1]
        out, n = torch.empty_like(q), metadata.num_actual_tokens
        layer.impl.do_kv_cache_update(layer, k[:n], v[:n], layer.kv_cache[:, :G], metadata.slot_mapping)
        if not H:
            return out
        full = (layer.num_heads, layer.num_kv_heads) == (H, used)
        plan = metadata if full else self._plan(metadata, H, used, q)
        return layer.impl.forward(layer, q, k[:, :used], v[:, :used], layer.kv_cache[:, :used], plan, out)

    def _plan(self, metadata: CPUAttentionMetadata, H: int, G: int, q: Tensor) -> CPUAttentionMetadata:
        key = (id(metadata), H, G, self.layer.impl.sliding_window)
        if key not in self.narrow:
            self.narrow[key] = replace(
                metadata,
                scheduler_metadata=_custom_ops.cpu_attn_get_scheduler_metadata(
                    num_reqs=len(metadata.seq_lens),
                    num_heads=H,
                    num_kv_heads=G,
                    head_dim=q.shape[-1],
                    seq_lens=metadata.seq_lens,
                    dtype=q.dtype,
                    query_start_loc=metadata.query_start_loc,
                    causal=metadata.causal,
                    sliding_window_size=self.layer.impl.sliding_window,
                    isa=self.layer.isa,
                    enable_kv_split=VLLM_CPU_ATTN_SPLIT_KV,
                    kv_cache_dtype=self.layer.impl.kv_cache_dtype,
                ),
            )
        return self.narrow[key]
