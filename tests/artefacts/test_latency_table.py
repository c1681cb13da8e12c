"""The latency table on paper: prediction, gradient, machine."""

import random
from dataclasses import replace

import pytest
import torch
from routing.synthetic import make_config, make_table

from flextron.artefacts.latency_table import Check, LatencyTable, Workload
from flextron.artefacts.noise import Noise
from flextron.config import Widths
from flextron.routing.fit import random_widths
from flextron.routing.search import one_hot

CONFIG = make_config()
TABLE = make_table(CONFIG)


def test_prediction_is_base_plus_slope_times_the_layers():
    widths = Widths((16, *(64,) * 11), (1, *(3,) * 11))
    layers = (0.01 * 16 + 0.05) + 11 * (0.01 * 64 + 0.05) + (0.2 + 0.1) + 11 * (0.6 + 0.1)
    assert TABLE.predict(widths) == pytest.approx(2.0 + 1.1 * layers)
    assert TABLE.fraction(CONFIG.full()) == 1.0


def test_expectation_of_certain_choices_is_the_prediction():
    rng = random.Random(0)
    drawn = [random_widths(CONFIG, rng) for _ in range(20)]
    expected = TABLE.expected(*(p.double() for p in one_hot(CONFIG, drawn)))
    assert expected.tolist() == pytest.approx([TABLE.predict(w) for w in drawn])


def test_expectation_is_the_mean_over_draws():
    mlp = torch.tensor([0.5, 0.0, 0.5, 0.0]).repeat(12, 1)
    heads = torch.tensor([0.25, 0.75, 0.0]).repeat(12, 1)
    by_hand = 2.0 + 1.1 * 12 * (0.5 * 0.21 + 0.5 * 0.53 + 0.25 * 0.3 + 0.75 * 0.5)
    assert float(TABLE.expected(mlp, heads)) == pytest.approx(by_hand)


def test_expectation_has_the_right_gradient():
    mlp = torch.rand(2, 12, 4, dtype=torch.float64, requires_grad=True)
    heads = torch.rand(2, 12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(TABLE.expected, (mlp, heads))


def test_a_table_of_other_menus_is_refused():
    with pytest.raises(ValueError, match="run `flextron profile DIR` again"):
        TABLE.check(make_config(layers=3))
    TABLE.check(CONFIG)


def test_another_machine_is_named():
    assert TABLE.differs(TABLE.machine) == []
    assert "threads 2, now it is 8" in TABLE.differs({**TABLE.machine, "threads": 8})[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("prefill", 0, 8),
        ("prefill", 1, 0),
        ("prefill", 1, 8, 8),
        ("decode", 1, 2, 8),
        ("decode", 1, 1, 0),
    ],
)
def test_impossible_workloads_are_refused(arguments):
    with pytest.raises(ValueError, match="Workload: "):
        Workload(*arguments)


def test_a_table_says_how_far_it_may_be_wrong():
    noisy = replace(TABLE, noise=Noise(taken=None, drift=0.12, spread=0.3))
    assert TABLE.error == 0 and TABLE.doubt is None
    assert noisy.error == 0.12 and "took 12% more or less at the end" in noisy.doubt
    off = replace(TABLE, held_out=(Check(CONFIG.full(), 12.0, 10.0),), noise=Noise(0.0, 0.0, 0.0))
    assert off.error == pytest.approx(0.2) and "an error of 20% on a network that it was" in off.doubt


def test_what_a_later_version_stored_is_stored_again_and_older_tables_are_read():
    values = TABLE.to_dict()
    later = LatencyTable.from_dict(values | {"humidity": [0.4]})
    assert later.unknown == {"humidity": [0.4]} and later.to_dict() == values | {"humidity": [0.4]}
    for name in ("noise", "spread_ms"):
        del values[name]
    assert LatencyTable.from_dict(values) == TABLE


def test_table_from_another_version_names_the_field():
    values = TABLE.to_dict()
    del values["base"]
    with pytest.raises(ValueError, match="base must be there, got nothing"):
        LatencyTable.from_dict(values)
