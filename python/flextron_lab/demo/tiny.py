"""A Llama small enough to be trained from nothing while one waits, and its tokenizer; no download at all."""

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
STEPS, BATCH, LENGTH = (
    320,
    4,
    128,
)  # 0.16 M tokens, each seen once; small batches learn more from as many tokens
LEARNING_RATE = 6e-3  # peak, after ten steps of warm-up; then a cosine to a tenth
SEED = 0


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 pieces learnt from ``documents``; no text is foreign to it."""
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
    """Four layers, eight query heads in four groups, tied embeddings: every part an elastic model has."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        # 120 steps end at 4.51 nats with it and at 4.76 with transformers' 0.02, which is for wide models.
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def train_model(
    tokens: Tensor, steps: int, progress: Callable[[str, int, int], None]
) -> tuple[LlamaForCausalLM, float]:
    """Train the model on the stream ``tokens``; the same stream and steps give the same weights.

    Returns:
        The model in eval mode, and its mean loss (nats a token) over the last twenty steps.
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
    """As many tokens as the training sees, from documents in a seeded order: a fair sample."""
    shuffled = random.Random(SEED).sample(documents, len(documents))
    return encode(shuffled, tokenizer, max_tokens=STEPS * BATCH * LENGTH)
