"""A training step of an elastic model at several widths, as a share of the full step: python bench_training.py"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flextron.artefacts.machine import machine_of
from flextron.config import Widths
from flextron.judge.objectives import cross_entropy
from flextron.judge.timing import compare, wait_until_idle
from flextron.nn import elastic_config, make_elastic


def smollm2_shape() -> LlamaConfig:
    """The shape of SmolLM2-135M; the weights are random, which costs the same time."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-wait", action="store_true", help="time at once, whatever else runs")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = LlamaForCausalLM(smollm2_shape())
    make_elastic(model, elastic_config(model))
    c, layers = model.elastic, model.elastic.num_layers
    ids = torch.randint(c.vocab_size, (args.batch_size, args.length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    half = c.intermediate_size // 2
    widths = {
        "full": c.full(),
        "half the neurons, 2 of 3 groups": Widths((half,) * layers, (2,) * layers),
        "half the neurons, half the groups": Widths((half,) * layers, (1, 2) * (layers // 2)),
        "half the neurons, 1 of 3 groups": Widths((half,) * layers, (1,) * layers),
    }

    def step() -> None:
        cross_entropy(model(input_ids=ids, use_cache=False).logits, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    if not args.no_wait:
        wait_until_idle()
    full, others = compare(
        ("full", step),
        {name: step for name in list(widths)[1:]},
        args.rounds,
        setup=lambda name: model.set_widths(widths[name]),
    )
    print(", ".join(f"{key} {value}" for key, value in machine_of(model).items()))
    print(f"forward, backward and AdamW on {args.batch_size} x {args.length} tokens")
    print(f"{'full':36} {1e3 * full.median:8.0f} ms   ratio 1.000")
    for name, found in others.items():
        low, high = min(found.ratios), max(found.ratios)
        ms = 1e3 * full.median * found.ratio
        print(f"{name:36} {ms:8.0f} ms   ratio {found.ratio:.3f}   {low:.3f} .. {high:.3f}")


if __name__ == "__main__":
    main()
