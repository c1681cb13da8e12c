"""Runs every stage on the second device, in a process of its own, and prints what each raised: test_elsewhere.py."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.serialization import _torch
from nn.models import small_model
from routing.synthetic import make_table
from second_device import FAKE, FakeTensor
from transformers import PreTrainedModel

import flextron
from flextron import inference, pipeline
from flextron.artefacts.latency_files import save_tables
from flextron.artefacts.latency_table import Workload
from flextron.artefacts.machine import machine_of
from flextron.checkpoint import hf
from flextron.corpus import Corpus, windows
from flextron.exporting import plain
from flextron.judge.budgets import judge_budgets
from flextron.nn import placement, projection
from flextron.recipes import AdaptiveConfig, RouteConfig, TrainConfig, TuneConfig
from flextron.routing import adaptive, static

ROOT = Path(tempfile.mkdtemp())
DIR = ROOT / "elastic"
rng = random.Random(0)
STREAM = torch.tensor([rng.randrange(1, 61) for _ in range(2000)])
TEXT = Corpus(STREAM, STREAM[:600])
IDS = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])

for module in (pipeline, inference, plain, placement):
    for name in ("one_device", "device_of_call"):
        if hasattr(module, name):
            setattr(module, name, lambda *_: FAKE)
pipeline.read_tokenizer = lambda _: None
# what says that a weight is plain looks at its class

adaptive._SURROGATE_STEPS, adaptive._REFIT_STEPS, static._WARM_STEPS = 4, 2, 4  # on the CPU all the same
_torch.get_torch_storage_id = lambda _: None  # and what cuts shards, at its address
projection.nn = SimpleNamespace(**{**vars(torch.nn), "Parameter": FakeTensor})


def moved(model: Any, *args: Any, _to: Any = PreTrainedModel.to, **kwargs: Any) -> Any:
    """`to`, in which tied parameters stay one: torch exchanges parameters of another class."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _to(model, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


PreTrainedModel.to = moved


def loaded(dtype: str = "float32") -> Any:
    model = flextron.from_pretrained(DIR, dtype)
    assert {p.device for p in model.parameters()} | {b.device for b in model.buffers()} == {FAKE}
    return model


def convert() -> None:
    small_model(num_hidden_layers=2).save_pretrained(ROOT / "parent")
    hf.read_tokenizer = lambda _: None
    pipeline.convert(ROOT / "parent", DIR, data=TEXT, samples=8, length=16)


def convert_in_memory() -> None:
    tokenizer = SimpleNamespace(save_pretrained=lambda _: None)
    model = small_model(num_hidden_layers=2).to(FAKE)
    pipeline.convert(model, ROOT / "other", data=TEXT, samples=8, length=16, tokenizer=tokenizer)


def train() -> None:
    config = TrainConfig(steps=2, batch_size=2, length=16, eval_every=1, checkpoint_every=1, distillation=1.0)
    pipeline.train(DIR, config, data=TEXT, validation_windows=2)
    pipeline.train(DIR, replace(config, steps=3), data=TEXT, validation_windows=2)  # goes on


def profile() -> None:
    pipeline.profile(DIR, [Workload.decode(4)], rounds=1, min_seconds=0.0, fit=2, held_out=1, patience=0)
    model = loaded()
    table = replace(make_table(model.elastic, base=0.1), machine=machine_of(model))
    save_tables([table], DIR)  # times of so small a model mean nothing


def profile_adaptive() -> None:
    pipeline.profile_adaptive(DIR, rounds=1, min_seconds=0.0)
    model = loaded()
    table = replace(make_table(model.elastic, base=0.1), machine=machine_of(model), adaptive=(0.1, 1.1))
    save_tables([table], DIR)


ROUTE = RouteConfig(targets=(0.8, 1.0), evaluations=16, prefill=8, steps=4, surrogate_steps=4)
ADAPTIVE = AdaptiveConfig(targets=(0.8, 1.0), steps=1, batch=2, calibration=2, judged=2)


def route_search() -> None:
    pipeline.route(DIR, replace(ROUTE, form="search"), data=TEXT, samples=2, length=16)


def route_gumbel() -> None:
    pipeline.route(DIR, replace(ROUTE, form="gumbel"), data=TEXT, samples=2, length=16)


def route_adaptive() -> None:
    pipeline.route_adaptive(DIR, ADAPTIVE, data=TEXT, samples=8, length=16)


def route_adaptive_surrogate() -> None:
    config = replace(ADAPTIVE, form="surrogate", prefill=12)
    pipeline.route_adaptive(DIR, config, data=TEXT, samples=8, length=16)


def tune() -> None:
    config = TuneConfig(
        steps=1, batch_size=2, length=16, full_probability=0.0, eval_every=2, checkpoint_every=1
    )
    pipeline.tune(DIR, config, data=TEXT, validation_windows=2, samples=4)
    pipeline.tune(DIR, replace(config, steps=2), data=TEXT, validation_windows=2, samples=4)  # goes on


def tune_adaptive() -> None:
    config = TuneConfig(steps=1, batch_size=2, length=16, full_probability=0.0, eval_every=1)
    pipeline.tune(DIR, config, adaptive=True, data=TEXT, validation_windows=2, samples=4, restart=True)


def evaluate() -> None:
    model = loaded()
    judge_budgets(model, windows(STREAM, 4, 16), [0.8], adaptive=True, rounds=1)


def generate() -> None:
    model = loaded()
    for budget, options in (
        (0.8, {}),
        ([0.8, 1.0], {"do_sample": True}),
        ({"fraction": 0.8, "adaptive": True}, {}),
        ({"fraction": 0.9, "kv": "all"}, {"num_beams": 2}),
    ):
        out = model.generate(IDS.to(FAKE), max_new_tokens=2, budget=budget, pad_token_id=0, **options)
        assert out.device == FAKE
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], device=FAKE)
    model.generate(IDS.to(FAKE), attention_mask=mask, max_new_tokens=2, budget=0.8, pad_token_id=0)


def generate_text() -> None:
    class Tokenizer:
        pad_token_id, eos_token_id = 0, None

        def __call__(self, *_: Any, **__: Any) -> Any:
            from transformers import BatchEncoding

            return BatchEncoding({"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])})

        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(map(str, ids.tolist()))

    assert len(inference.generate(loaded(), Tokenizer(), "x", 3).split()) == 7


def padded_on_the_right() -> None:
    model = loaded()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], device=FAKE)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model(IDS.to(FAKE), attention_mask=mask)


def half() -> None:
    model = loaded("bfloat16")
    model.set_budget(0.8, adaptive=True)
    model(IDS.to(FAKE))


def extract() -> None:
    model = loaded()
    small = flextron.extract(model, model.elastic.smallest())
    assert {p.device for p in small.parameters()} | {b.device for b in small.buffers()} == {FAKE}
    small(IDS.to(FAKE))


def export() -> None:
    model = loaded()
    for layout in ("padded", "ragged"):
        flextron.export(model, ROOT / layout, 0.8, layout=layout)
        flextron.load_plain(ROOT / layout)(IDS.to(FAKE))


def save() -> None:
    loaded().save_pretrained(ROOT / "saved")


STAGES: dict[str, Callable[[], None]] = {
    stage.__name__: stage
    for stage in (
        *(convert, convert_in_memory, train, profile, profile_adaptive, route_search, route_gumbel),
        *(route_adaptive_surrogate, route_adaptive, evaluate, generate, generate_text),
        *(padded_on_the_right, half, extract, export, save, tune, tune_adaptive),
    )
}


def main(only: Sequence[str] = ()) -> None:
    warnings.simplefilter("ignore")
    found = {}
    for name, stage in STAGES.items():
        if only and name not in only and name not in ("convert",):
            continue
        began = time.process_time()
        try:
            stage()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        seconds = time.process_time() - began
        print(name, "FAILED" if found[name] else "ok", f"{seconds:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
