"""The adaptive router of a checkpoint: it survives the file, and another is left out or refused."""

import json
from dataclasses import replace

import pytest
import torch
from nn.models import small_model
from routing.synthetic import make_origin, make_table

from flextron.artefacts import adaptive_router
from flextron.artefacts.adaptive_router import AdaptiveResult
from flextron.artefacts.ladder import uniform_ladder
from flextron.checkpoint import CheckpointError
from flextron.nn import elastic_config, make_elastic
from flextron.recipes import AdaptiveConfig
from flextron.routing.adaptive import train_adaptive

OPTIONS = AdaptiveConfig(targets=(0.6, 0.8, 1.0), steps=2, prefill=12, batch=2, calibration=2, judged=2)


@pytest.fixture(scope="module")
def model():
    model = small_model()
    return make_elastic(model, elastic_config(model))


@pytest.fixture(scope="module")
def routers(model):
    """form -> a router trained so."""
    table, tokens = make_table(model.elastic, base=0.5), torch.arange(6 * 16).view(6, 16) % 61
    ladder = uniform_ladder(model.elastic)
    return {
        form: train_adaptive(model, {"prefill": table}, ladder, tokens, replace(OPTIONS, form=form))
        for form in ("gumbel", "surrogate")
    }


@pytest.mark.parametrize("form", ["gumbel", "surrogate"])
def test_a_router_survives_the_file(routers, form, model, tmp_path):
    trained = routers[form]
    origin = make_origin(model.elastic)
    assert adaptive_router.load(tmp_path, origin) is None
    trained.save(tmp_path, origin)
    loaded = adaptive_router.load(tmp_path, origin)
    assert loaded.to_dict() == trained.to_dict()
    with pytest.warns(
        UserWarning, match=r"adaptive\.json: was made for other .* run `flextron route .* --adaptive`"
    ):
        assert adaptive_router.load(tmp_path, make_origin(model.elastic, "cd" * 32)) is None
    with pytest.raises(
        CheckpointError, match=r"adaptive\.json: must be made for the model here, got one of tied"
    ):
        adaptive_router.load(tmp_path, make_origin(replace(model.elastic, tied=not model.elastic.tied)))
    for a, b in zip(loaded.router.state_dict().values(), trained.router.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert loaded.config == replace(OPTIONS, form=form, threshold=trained.config.threshold)
    assert (loaded.surrogate is None) == (loaded.gate is None) == (form == "gumbel")


def test_a_damaged_or_foreign_file_is_refused(routers, model, tmp_path):
    trained = routers["gumbel"]
    trained.save(tmp_path, make_origin(model.elastic))
    described = json.loads((tmp_path / "adaptive.json").read_text())
    for change, words in (
        ({"format": 3}, "format must be 1 or 2, got 3"),
        ({"router": {**described["router"], "hidden": 4}}, "wrong shape"),
        ({"checksum": "0" * 64}, "sha256 must be"),
        ({"calibration": None}, "calibration must be an object, got None"),
        ({"config": {"speed": 1}}, "config.speed must not be there"),
        ({"checksum": None}, "checksum must be a string, got None"),
        ({"phase": 3}, "phase must be a string, got 3"),
        ({"router": {**described["router"], "hidden": 10**12}}, "router must fit the weights"),
    ):
        (tmp_path / "adaptive.json").write_text(json.dumps({**described, **change}))
        with pytest.raises(ValueError, match=words):
            AdaptiveResult.load(tmp_path)
