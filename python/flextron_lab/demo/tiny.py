"""A Llama that is small enough to train from scratch in a minute, and its tokenizer; nothing is downloaded."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flextron.data import Batches, encode

VOCAB = 512
# 0.16 M tokens, each seen once: a small batch learns more from the same number of tokens
STEPS, BATCH, LENGTH = 320, 4, 128
LEARNING_RATE = 6e-3  # the peak, after ten steps of warm-up; a cosine then falls to a tenth of it
SEED = 0


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with 512 pieces, learnt from ``documents``; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def config() -> LlamaConfig:
    """A shape with every part of an elastic model: several layers, grouped query heads, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        # transformers' 0.02 suits wide models: 120 steps end at 4.76 nats with it, and at 4.51 with 0.08
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def train_model(
    tokens: Tensor, steps: int, progress: Callable[[str, int, int], None]
) -> tuple[LlamaForCausalLM, float]:
    """Train the model on a stream of tokens; the same stream and steps give the same weights.

    Returns:
        The model in eval mode, and its mean loss over the last twenty steps in nats per token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 10, 0.55 + 0.45 * math.cos(math.pi * s / steps))
    )
    losses = []
    for step, batch in zip(range(steps), Batches(tokens, BATCH, LENGTH, SEED), strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress("training the tiny parent", step + 1, steps)
    return model.eval(), sum(losses[-20:]) / len(losses[-20:])


def token_stream(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The tokens that training sees: of documents in a seeded order, so that they are a fair sample."""
    shuffled = random.Random(SEED).sample(documents, len(documents))
    return encode(shuffled, tokenizer, max_tokens=STEPS * BATCH * LENGTH)
