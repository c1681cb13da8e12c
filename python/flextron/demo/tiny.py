"""A Llama small enough to be trained from nothing while one waits, and its tokenizer; no download at all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flextron.data import stdlib_documents

VOCAB = 512
STEPS = 300
BATCH, LENGTH = 16, 128  # 2048 tokens a step, 0.6 M in all: about the corpus once
LEARNING_RATE = 4e-3  # peak; ten steps of warm-up, then a cosine to a tenth
SEED = 0


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 pieces learnt from the standard library's documentation: 256 bytes are 256 pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    tokenizer.train_from_iterator(
        stdlib_documents(),
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=special,
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
    """Five layers, eight query heads in four groups, tied embeddings: every part an elastic model has."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def train_model(
    tokenizer: PreTrainedTokenizerFast, progress: Callable[[str, int, int], None], steps: int = STEPS
) -> tuple[LlamaForCausalLM, float]:
    """Train the model for ``steps`` steps; same seed, same weights.

    Returns:
        The model in eval mode, and its mean loss (nats a token) over the last twenty steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config()).train()
    draw = torch.Generator().manual_seed(SEED)
    tokens = _tokens(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 10, 0.55 + 0.45 * math.cos(math.pi * s / steps))
    )
    losses = []
    for step in range(steps):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH, 1), generator=draw)
        batch = tokens[starts + torch.arange(LENGTH)]  # [BATCH, LENGTH]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress("training the tiny parent", step + 1, steps)
    last = losses[-20:]
    return model.eval(), sum(last) / len(last)


def _tokens(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The whole corpus as one row of ids, each document opened by <s>."""
    return torch.tensor([i for ids in tokenizer(stdlib_documents())["input_ids"] for i in ids])
