"""The study of the best choice for every token: its arithmetic, its multiplier, and the mixed run."""

from itertools import product

import pytest
import torch
from nn.models import small_model
from scripts import load_script

from flextron.artefacts.ladder import uniform_ladder
from flextron.nn import make_elastic
from flextron.nn.router import Indices
from flextron_lab.study.arithmetic import arithmetic_table

TEXT = torch.randint(1, 61, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def study():
    return load_script("studies/oracle.py")


@pytest.fixture(scope="module")
def model():
    return make_elastic(small_model()).requires_grad_(False)


@pytest.fixture
def rungs(study, model):
    tables = (arithmetic_table(model.elastic, 12, choosing) for choosing in (False, True))
    return study.Rungs.of(uniform_ladder(model.elastic), *tables, 4)


def test_the_arithmetic_is_that_of_the_layers(model):
    config = model.elastic
    K, D, T = config.hidden_size, config.head_dim, 12
    full, least = config.full(), config.smallest()
    alike, choosing = (arithmetic_table(config, T, own) for own in (False, True))

    def by_hand(widths, stored):
        mlp = 3 * K * sum(widths.mlp)
        query = sum(config.query_heads(n) for n in widths.heads) * (2 * K * D + 2 * D * (T + 1) / 2)
        return (mlp + query + 2 * K * D * sum(stored)) / 1e6

    assert alike.predict(full) == pytest.approx(by_hand(full, full.heads))
    assert alike.predict(least) == pytest.approx(by_hand(least, least.heads))
    assert choosing.predict(least) == pytest.approx(by_hand(least, full.heads))
    assert choosing.predict(full) == pytest.approx(alike.predict(full))


def test_no_other_choices_within_the_limit_lose_less(study):
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(6, 3, generator=generator)
    costs = torch.tensor([0.2, 0.5, 1.0])
    for limit in (0.3, 0.5, 0.75):
        chosen = study.choose(scores, costs, limit)
        spent = float(costs[chosen].mean())
        assert spent <= limit
        others = torch.tensor(list(product(range(3), repeat=6)))
        allowed = others[costs[others].mean(1) <= spent + 1e-6]
        best = scores.gather(1, allowed.T).mean(0).min()
        assert float(scores.gather(1, chosen[:, None]).mean()) == pytest.approx(float(best), abs=1e-6)
    with pytest.raises(ValueError, match=r"limit must be at least 0\.2"):
        study.choose(scores, costs, 0.1)


def test_tokens_that_take_one_rung_lose_what_the_static_network_loses(study, model, rungs):
    for r, widths in enumerate(rungs.widths):
        mixed = study.run(model, TEXT, rungs, torch.full(TEXT.shape, r))
        alone, _ = study.token_losses(model, TEXT, study.at(model, widths))
        torch.testing.assert_close(mixed, alone)


def test_a_mixed_choice_is_each_tokens_own(study, model, rungs):
    top = len(rungs.widths) - 1
    late = torch.zeros_like(TEXT)
    late[:, 6:] = top
    narrow, mixed = (study.run(model, TEXT, rungs, chosen) for chosen in (torch.zeros_like(TEXT), late))
    torch.testing.assert_close(mixed[:, :6], narrow[:, :6])
    assert (mixed[:, 6:] - narrow[:, 6:]).abs().min() > 1e-6


def test_static_budgets_are_mixed_along_the_hull(study):
    losses = torch.tensor([[4.0, 4.0], [3.9, 3.9], [2.0, 2.0]])  # the middle rung lies above the line
    static = study.Static(torch.tensor([0.2, 0.6, 1.0]), losses)
    assert static.at(0.6).tolist() == pytest.approx([3.0, 3.0])
    with pytest.raises(ValueError, match="cost must lie within"):
        static.at(0.1)


def test_a_move_to_the_base_changes_nothing_and_another_one_its_own_token(study, model, tmp_path):
    case = study.Study(tmp_path, tmp_path, "stories15m", 1, 1, 1, lambda *_: None)
    case.__dict__["model"] = model
    base = Indices(
        *(torch.zeros(TEXT.numel(), model.elastic.num_layers, dtype=torch.int64) for _ in range(2))
    )
    found = study.moves(case, TEXT, base, "mlp")
    model.set_widths(model.elastic.smallest())
    alone, _ = study.token_losses(model, TEXT, lambda _: None)
    torch.testing.assert_close(found[:, :, :, 0], alone[:, :, None].expand(-1, -1, 3))
    chosen = base._replace(mlp=base.mlp.clone())
    chosen.mlp.view(*TEXT.shape, -1)[:, 2, 1] = 1  # the third token, before which none moves with it
    moved = study._own_losses(model, TEXT, chosen, torch.tensor([2]))
    torch.testing.assert_close(found[:, 2, 1, 1], moved[:, 0])
