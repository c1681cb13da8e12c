"""Where a budget, width or count is taken, NumPy's and torch's scalars are numbers; truth values and NaN are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from nn.models import small_model
from nn.test_elastic_model import elastic, tokens
from nn.test_setting import planned
from transformers import BatchEncoding

import flextron
from flextron.artefacts.ladder import uniform_ladder
from flextron.artefacts.latency_table import Workload
from flextron.artefacts.planner import Planner
from flextron.corpus import windows
from flextron.inference import generate
from flextron.nn import Dial

WIDTHS = {"mlp": (24, 40, 40), "heads": (1, 4, 2)}


def budget(**given: Any) -> Any:
    return planned(elastic()).set_budget(**given)


def planner(**given: Any) -> Any:
    config = elastic().elastic
    return Planner(config, (), uniform_ladder(config)).resolve(**given)


def menus(choices: Any) -> Any:
    return flextron.elastic_config(small_model(), "kv_group", choices, None)


class Spelled:
    """A tokenizer and a model of single numbers."""

    pad_token_id = 0

    def __call__(self, prompt: str, **_: Any) -> Any:
        return BatchEncoding({"input_ids": tokens(1, 4)})

    def decode(self, ids: Any, **_: Any) -> str:
        return ids.tolist()


# What takes a number: (a call of it, a good value).
TAKERS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "set_budget": (lambda n: budget(fraction=n), 0.6),
    "set_budget, in full": (lambda n: budget(fraction=n), 1),
    "set_budget, adaptive": (lambda n: Dial.adaptive(elastic().elastic, [n]).targets, 0.6),
    "generate": (lambda n: planned(elastic()).generate(tokens(), budget=n, max_new_tokens=2).tolist(), 0.6),
    "Planner, params": (lambda n: planner(params=n), 40000),
    "Planner, batch": (lambda n: planner(memory_gb=1.0, batch=n, context=4), 2),
    "Planner, context": (lambda n: planner(memory_gb=1.0, context=n), 7),
    "Widths": (lambda n: flextron.Widths((n, 40, 40), WIDTHS["heads"]), 24),
    "ElasticConfig": (lambda n: menus((n, 40)), 24),
    "Workload": (lambda n: json.dumps(asdict(Workload("prefill", batch=n, length=n))), 2),
    "TrainConfig, count": (lambda n: json.dumps(asdict(flextron.TrainConfig(steps=n))), 7),
    "TrainConfig, rate": (lambda n: json.dumps(asdict(flextron.TrainConfig(learning_rate=n))), 0.25),
    "TuneConfig": (lambda n: json.dumps(asdict(flextron.TuneConfig(router_rate=n))), 0.25),
    "RouteConfig": (lambda n: json.dumps(asdict(flextron.RouteConfig(targets=(n, 1.0)))), 0.5),
    "AdaptiveConfig": (lambda n: json.dumps(asdict(flextron.AdaptiveConfig(hidden=n))), 8),
    "text": (lambda n: windows(torch.arange(64), n, n).tolist(), 2),
    "inference.generate": (lambda n: generate(elastic(), Spelled(), "", n), 3),
}


@pytest.mark.parametrize("name", TAKERS)
def test_a_scalar_is_a_number(name):
    take, value = TAKERS[name]
    expected = take(value)
    whole = isinstance(value, int)
    for scalar in (np.int64, np.uint8 if value < 256 else np.int32) if whole else (np.float64, np.float32):
        assert take(scalar(value)) == take(type(value)(scalar(value)))
    assert take(torch.tensor(value, dtype=torch.int64 if whole else torch.float64)) == expected


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), float("nan"), np.float32("nan"), "1", [[1]]]
)
@pytest.mark.parametrize("name", TAKERS)
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(ValueError, match=r"^[\w.]+: .*must be a (whole |positive )?number, got ") as error:
        TAKERS[name][0](value)
    assert "\n" not in str(error.value)


def test_a_row_is_a_budget_for_each_request():
    model = planned(elastic())
    expected = model.set_budget([0.3, 0.9])
    for row in (np.array([0.3, 0.9]), torch.tensor([0.3, 0.9], dtype=torch.float64), (0.3, 0.9)):
        assert model.set_budget(row) == expected
        assert model.generate(tokens(), budget=row, max_new_tokens=1).shape == (2, 13)
    assert menus(np.array([24, 40])) == menus((24, 40))


def test_counts_are_in_range_and_widths_are_widths():
    for given, text in (
        (dict(memory_gb=1.0, batch=0), "budget: batch must be at least 1, got 0"),
        (dict(memory_gb=1.0, context=-1), "budget: context must be at least 0, got -1"),
        (dict(params=float("inf")), "budget: params must be a positive number, got inf"),
    ):
        with pytest.raises(ValueError, match=text):
            planner(**given)
    model = elastic()
    for widths in (0.5, [0.5], None):
        with pytest.raises(ValueError, match=r"widths: it must be a Widths, got "):
            model.set_widths(widths)
    with pytest.raises(ValueError, match=r"widths: mlp must be a whole number, got 24\.5"):
        flextron.Widths((24.5,) * 3, (1,) * 3)
