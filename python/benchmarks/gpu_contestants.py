"""Who generates on a GPU in bench_model.py: ours, as one captured graph and step by step; stock transformers; vLLM.

Everything is greedy, on random weights made on the device in their dtype. On a CPU the same code runs, without graphs
and compilation: a stand-in that shows that every contestant is called rightly.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import flextron
from flextron.artefacts.machine import processor
from flextron.config import Widths
from flextron.judge.timing import clock_of
from flextron.nn import ElasticCache

Times = tuple[float, float]  # seconds of the prompt with its first token, and of each token after it
Run = Callable[[], Times]

WHO = {  # as --who has them, and as the figures do
    "graph": "flextron, graph",
    "eager": "flextron, eager",
    "stock": "transformers",
    "compiled": "transformers, static + compile",
    "vllm": "vLLM",
}


def random_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A stock model whose weights are drawn on the device: no copy of them was ever elsewhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def whole_calls(generate: Callable[[int], object], new: int, device: torch.device) -> Run:
    """Times of two whole calls, of one token and of ``new`` more: nothing looks at a token in between."""

    def seconds(tokens: int) -> float:
        _wait(device)
        begin = perf_counter()
        generate(tokens)
        _wait(device)
        return perf_counter() - begin

    def run() -> Times:
        first, all_of_them = seconds(1), seconds(1 + new)
        return first, (all_of_them - first) / new

    return run


def generation(model: Any, ids: Tensor, new: int, **options: Any) -> Run:
    """Greedy generate() of a transformers model. ``options`` may be functions that make an argument for each call."""
    mask = torch.ones_like(ids)
    settings = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(tokens: int) -> object:
        made = {name: value() if callable(value) else value for name, value in options.items()}
        return model.generate(ids, max_new_tokens=tokens, **settings, **made)

    return whole_calls(generate, new, ids.device)


def at_width(run: Run, model: Any, widths: Widths) -> Run:
    def at() -> Times:
        model.set_widths(widths)
        return run()

    return at


def of_vllm(folder: Path, config: LlamaConfig, dtype: torch.dtype, ids: Tensor, new: int) -> Run:
    """vLLM on random weights of the same shape; it reads the configuration alone."""
    from vllm import LLM, SamplingParams

    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    engine = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=ids.shape[1] + new + 16,
        max_num_seqs=len(ids),
        enable_prefix_caching=False,
        gpu_memory_utilization=0.4,
    )
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]

    def generate(tokens: int) -> object:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        return engine.generate(prompts, sampling, use_tqdm=False)

    return whole_calls(generate, new, ids.device)


def contestants(
    full: LlamaForCausalLM, elastic: Any, widths: dict[float, Widths], ids: Tensor, new: int
) -> Iterator[tuple[float, str, Callable[[], Run]]]:
    """(width, who, what makes its run). At widths below 1 transformers runs what `flextron.extract` takes out."""
    for share, chosen in widths.items():
        plain = cache(
            lambda chosen=chosen, share=share: full if share == 1 else flextron.extract(elastic, chosen)
        )
        ours = {"graph": {}, "eager": {"cache": ElasticCache}}
        for who, options in ours.items():
            yield share, who, partial(at_width, generation(elastic, ids, new, **options), elastic, chosen)
        theirs: dict[str, dict[str, Any]] = {"stock": {}, "compiled": {"cache_implementation": "static"}}
        for who, options in theirs.items():
            yield share, who, lambda plain=plain, options=options: generation(plain(), ids, new, **options)


def has_vllm() -> bool:
    if importlib.util.find_spec("vllm") is None:
        print("bench_model: vLLM is not installed, so it is not beside the others")
        return False
    return True


def read_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second that the device reads in the fastest of some reductions over ``size`` bytes."""
    values = torch.ones(size // 4, device=device)
    clock = clock_of(device)
    reductions = (values.sum, values.amax, values.view(torch.int64).sum)
    best = min(clock(reduce, 3) / 3 for reduce in reductions for _ in range(3))
    return values.numel() * 4 / best


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def forget() -> None:
    """Give the memory of models that nobody holds any longer back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
