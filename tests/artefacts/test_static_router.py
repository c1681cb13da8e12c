"""The static routers of a checkpoint: they survive the file, and others are left out or refused."""

import json
from dataclasses import replace

import pytest
import torch
from routing.synthetic import SyntheticLoss, make_config, make_origin, make_table, planner_in

from flextron.artefacts.latency_files import save_tables
from flextron.artefacts.static_router import RouterResult, load, load_ladder
from flextron.checkpoint import CheckpointError
from flextron.recipes import RouteConfig
from flextron.routing.static import train_routers

CONFIG = make_config(layers=8)
TABLE = make_table(CONFIG)
ORIGIN = make_origin(CONFIG)


@pytest.fixture(scope="module")
def trained() -> RouterResult:
    quick = RouteConfig(
        targets=(0.3, 0.5, 0.65, 0.8, 1.0),
        **{"evaluations": 60, "prefill": 24, "steps": 40, "surrogate_steps": 40},
        **{"surrogate_hidden": 16, "hidden": 16},
    )
    return train_routers(CONFIG, TABLE, SyntheticLoss(CONFIG), quick)


def test_routers_survive_the_file(trained, tmp_path):
    trained.save(tmp_path, ORIGIN)
    loaded = RouterResult.load(tmp_path)
    assert loaded.to_dict() == trained.to_dict()
    for a, b in zip(loaded.router(0.57), trained.router(0.57), strict=True):
        assert torch.equal(a, b)
    assert load_ladder(tmp_path, ORIGIN) == trained.ladder
    save_tables([TABLE], tmp_path)
    assert planner_in(tmp_path, ORIGIN).ladder == trained.ladder


def test_routers_of_other_weights_are_left_out_and_named(trained, tmp_path):
    trained.save(tmp_path, ORIGIN)
    moved = make_origin(CONFIG, "cd" * 32)
    said = (
        "routers.json: was made for other weights .abababababab. than those here .cdcdcdcdcdcd., and is left out; "
        f"run `flextron route {tmp_path}`"
    )
    with pytest.warns(UserWarning, match=said):
        assert load_ladder(tmp_path, moved) is None
    with pytest.warns(UserWarning, match=said):
        assert planner_in(tmp_path, moved).ladder.origin == "uniform"
    with pytest.warns(UserWarning, match=said):
        assert load(tmp_path, moved) is None
    assert load(tmp_path, ORIGIN).to_dict() == trained.to_dict()


def test_routers_of_another_model_are_refused(trained, tmp_path):
    trained.save(tmp_path, ORIGIN)
    other = make_origin(replace(CONFIG, family="qwen3", hidden_size=64))
    with pytest.raises(
        CheckpointError, match="family llama instead of qwen3, hidden_size 32 instead of 64; run"
    ):
        load_ladder(tmp_path, other)


def test_routers_of_unknown_weights_are_left_out_and_named(trained, tmp_path):
    trained.save(tmp_path, ORIGIN)
    content = json.loads((tmp_path / "routers.json").read_text())
    del content["made_for"]
    (tmp_path / "routers.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="does not say which weights .* run `flextron route"):
        assert load_ladder(tmp_path, ORIGIN) is None
    (tmp_path / "routers.json").write_text(json.dumps({**content, "made_for": {"elastic": 3}}))
    with pytest.raises(CheckpointError, match=r"routers\.json: made_for.weights must be there"):
        load_ladder(tmp_path, ORIGIN)


def test_routers_trained_on_another_table_are_used_and_say_so(trained, tmp_path):
    trained.save(tmp_path, ORIGIN)
    for tables in ((), (replace(TABLE, slope=2.0),)):
        with pytest.warns(
            UserWarning, match="trained on another latency table of prefill .* run `flextron route"
        ):
            assert load_ladder(tmp_path, ORIGIN, tables) == trained.ladder


def test_no_routers_no_ladder(tmp_path):
    assert load_ladder(tmp_path, ORIGIN) is None


def test_damaged_routers_are_refused(trained, tmp_path):
    trained.save(tmp_path, ORIGIN)
    weights = tmp_path / "routers.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"routers\.safetensors: sha256 must be"):
        RouterResult.load(tmp_path)
    (tmp_path / "routers.json").write_text(json.dumps({"format": 1, "made_for": ORIGIN.to_dict()}))
    with pytest.raises(ValueError, match=r"routers\.json: ladder must be an object"):
        load_ladder(tmp_path, ORIGIN)
