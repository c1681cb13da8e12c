"""Models in the llama2.c format (stories260K, stories15M) as transformers models and tokenizers."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FILES = ("stories260K.bin", "tok512.bin")
FILES_15M = ("config.json", "model.safetensors", "tokenizer.bin")
HEADER = 28  # bytes: seven int32


def data_folder() -> Path:
    """The folder of data outside the repository: ``$FLEXTRON_DATA``, or ``shared/data`` beside the repository."""
    repository = Path(__file__).resolve().parents[3]
    return Path(os.environ.get("FLEXTRON_DATA") or repository.parent / "shared" / "data")


def find(name: str = "stories260k", files: tuple[str, ...] = FILES) -> Path | None:
    """The folder that holds all of a model's files; None where one is missing."""
    folder = data_folder() / name
    return folder if all((folder / file).is_file() for file in files) else None


def read_model(file: Path) -> LlamaForCausalLM:
    """A llama2.c "version 0" checkpoint as a transformers Llama in float32."""
    blob = file.read_bytes()
    header = struct.unpack_from("<7i", blob) if len(blob) >= HEADER else (0,)
    # A negative vocabulary marks an output matrix that is not tied, which none of our files has.
    if min(header) <= 0:
        raise ValueError(f"read_model: {file.name} must be a tied llama2.c checkpoint, got header {header}")
    K, F, layers, H, G, vocab, context = header
    D = K // H
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=K,
        intermediate_size=F,
        num_hidden_layers=layers,
        num_attention_heads=H,
        num_key_value_heads=G,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).float().eval()
    values = torch.from_numpy(np.frombuffer(blob, "<f4", (len(blob) - HEADER) // 4, HEADER).copy())
    offset = 0

    def take(*shape: int) -> Tensor:
        nonlocal offset
        size = int(np.prod(shape))
        offset += size
        if offset > len(values):
            raise ValueError(
                f"read_model: {file.name} must hold every weight of its header, got {len(values)} values"
            )
        return values[offset - size : offset].view(shape)

    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(take(vocab, K))
        # The file stores all layers of one matrix together, in this order.
        parts = {
            "input_layernorm": take(layers, K),
            "self_attn.q_proj": _half_split(take(layers, K, K), H),
            "self_attn.k_proj": _half_split(take(layers, G * D, K), G),
            "self_attn.v_proj": take(layers, G * D, K),
            "self_attn.o_proj": take(layers, K, K),
            "post_attention_layernorm": take(layers, K),
            "mlp.gate_proj": take(layers, F, K),
            "mlp.down_proj": take(layers, K, F),
            "mlp.up_proj": take(layers, F, K),
        }
        for name, stack in parts.items():
            for layer, weight in zip(model.model.layers, stack, strict=True):
                layer.get_submodule(name).weight.copy_(weight)
        model.model.norm.weight.copy_(take(K))
    return model


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows [L, heads*D, K] from interleaved RoPE pairs to pairs that are half a head apart."""
    L, rows, K = weight.shape
    return weight.view(L, heads, rows // heads // 2, 2, K).transpose(2, 3).reshape(L, rows, K)


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """A llama2.c tokenizer (scored pieces with byte fallback) as a transformers one."""
    pieces = _read_pieces(file)
    special = {1: "<s>", 2: "</s>"}
    vocab = {special.get(i, piece): i for i, (piece, _) in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab, _merges(pieces, vocab), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _read_pieces(file: Path) -> list[tuple[str, float]]:
    blob, offset, pieces = file.read_bytes(), 4, []
    while offset < len(blob):
        score, length = struct.unpack_from("<fi", blob, offset)
        offset += 8
        pieces.append((blob[offset : offset + length].decode("utf-8"), score))
        offset += length
    return pieces


def _merges(pieces: list[tuple[str, float]], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that scores amount to: every split of a piece into two pieces, the best-scoring piece first."""
    ranked = sorted(range(259, len(pieces)), key=lambda i: -pieces[i][1])
    return [
        (piece[:cut], piece[cut:])
        for piece in (pieces[i][0] for i in ranked)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
