"""The benchmark of training counts steps that train, tells where all of a step's time goes, and runs beside itself."""

import argparse

import pytest
from scripts import load_script

bench = load_script("benchmarks/bench_training.py")
ARGUMENTS = argparse.Namespace(batch_size=2, length=16, steps=2, seconds=0.2)


@pytest.mark.parametrize("half", [True, False])
def test_a_step_s_time_is_divided_without_rest(half):
    model = bench.elastic(bench.toy_shape())
    network = bench.halved(model.elastic) if half else None
    rates, busy, spent, wall = bench.trained(model, network, ARGUMENTS)
    assert len(rates) == 2 and all(rate > 0 for rate in rates) and busy > 0
    assert sum(spent.values()) == pytest.approx(wall)
    named = [*bench.DIVISION, "other operations"]
    assert list(spent)[:-1] == named and all(spent[name] >= 0 for name in named)
    assert spent["products of the layers"] > 0 and spent["AdamW and norms of gradients"] > 0


def test_half_the_model_is_half_of_its_neurons_and_groups():
    for shape in (bench.smollm2_shape(), bench.toy_shape()):
        c = bench.elastic_config(bench.LlamaForCausalLM(shape))
        half = bench.halved(c)
        assert sum(half.mlp) * 2 == c.intermediate_size * c.num_layers
        assert sum(half.heads) * 2 == c.num_kv_heads * c.num_layers


def test_two_trainings_at_once_each_tell_their_steps():
    found = bench.together(2, bench.SPINS, ARGUMENTS)
    assert len(found) == 2 and all(steps > 0 for steps in found)
