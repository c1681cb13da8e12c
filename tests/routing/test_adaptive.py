"""The adaptive router: trained, calibrated to its budgets on text it sees and text it does not."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from synthetic import make_table
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from flextron.artefacts.directory import load_elastic
from flextron.artefacts.ladder import uniform_ladder
from flextron.artefacts.latency_table import Workload
from flextron.artefacts.planner import Planner
from flextron.conversion import convert
from flextron.judge.latency import fractions
from flextron.nn import Dial, elastic_config, make_elastic
from flextron.nn.router import Indices, Probabilities
from flextron.recipes import AdaptiveConfig
from flextron.routing import adaptive
from flextron.routing.adaptive import train_adaptive
from flextron_lab.demo import stories

VOCAB = 32
OPTIONS = AdaptiveConfig(targets=(0.3, 0.6, 0.8, 1.0), steps=60, batch=8, calibration=16, judged=16)


def text(n: int, length: int = 48, seed: int = 0) -> torch.Tensor:
    """Sequences of easy tokens (the next is one more) and hard ones (anything), in runs."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(n, length, dtype=torch.long)
    for t in range(1, length):
        easy = (ids[:, t - 1] + 1) % VOCAB
        ids[:, t] = torch.where(
            torch.rand(n, generator=g) < 0.7, easy, torch.randint(VOCAB, (n,), generator=g)
        )
    return ids


@pytest.fixture(scope="module")
def model():
    """A small Llama that has learnt the text at all of its widths, well enough that width matters."""
    torch.manual_seed(0)
    hf = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = make_elastic(LlamaForCausalLM(hf), elastic_config(hf, mlp_choices=(16, 32, 48, 64)))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(80):
        model.set_widths(model.elastic.full() if step % 2 else model.elastic.uniform(1, 0))
        ids = text(8, seed=step + 100)
        logits = model(ids, use_cache=False).logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()
    model.set_widths(model.elastic.full())
    return model.eval()


@pytest.fixture(scope="module")
def tables(model):
    decode = replace(make_table(model.elastic, "decode", base=0.5), workload=Workload.decode(64, batch=2))
    return {"prefill": make_table(model.elastic, base=0.5), "decode": decode}


def run(model, tables, **changes):
    return train_adaptive(model, tables, uniform_ladder(model.elastic), text(64), replace(OPTIONS, **changes))


@pytest.fixture(scope="module")
def trained(model, tables):
    return run(model, tables)


@pytest.fixture
def routed(model, trained):
    model.attach_router(trained.router)
    yield model
    model.attach_router(None)
    model.set_widths(model.elastic.full())


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_targets_are_met_on_text_not_seen(routed, tables, phase):
    """Trained targets and between them, within 5 %: the mean over tokens, at decode the widest of a batch of two."""
    wanted = [0.6, 0.65, 0.7, 0.75, 0.8, 0.9]
    found = fractions(routed, tables[phase], text(64, seed=7), wanted, phase)
    assert ((found / torch.tensor(wanted) - 1).abs() < 0.05).all(), found


def test_a_larger_target_never_takes_less(routed, tables):
    grid = [0.45 + 0.025 * i for i in range(23)]
    found = fractions(routed, tables["prefill"], text(48, seed=8), grid, "prefill").tolist()
    assert all(a <= b + 1e-3 for a, b in pairwise(found)), found
    fastest = tables["prefill"].smallest_ms / tables["prefill"].full_ms
    assert found[-1] == pytest.approx(1.0) and found[0] == pytest.approx(fastest, rel=0.02)


def test_tokens_differ_and_the_report_is_what_happened(routed, trained, tables):
    held_out = text(64)[-OPTIONS.judged :]
    for t in trained.targets:
        with torch.no_grad():
            routed.turn(Dial.adaptive(routed.elastic, [t.target]))
            with routed.watched() as forwards:
                logits = routed(held_out, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten())
        assert float(loss) == pytest.approx(t.loss, abs=1e-5)
        took = float(tables["prefill"].of_tokens(forwards[0])) / tables["prefill"].full_ms
        assert took == pytest.approx(t.fraction, abs=1e-6)
    assert any(len(axis[..., i].unique()) > 1 for axis in forwards[0] for i in range(2))


def test_it_does_not_lose_to_where_it_started(trained):
    for t in trained.targets:
        assert t.loss < t.static_loss + 0.01


@pytest.mark.skipif(stories.find() is None, reason="stories260K is not among the data")
def test_training_pays_on_a_real_model(tmp_path):
    """Importance order, no elastic training, 60 router steps: less loss than the uniform ladder at each target, which
    is met within 5 % on sequences of their own."""
    folder = stories.find()
    parent = stories.read_model(folder / "stories260K.bin")
    g = torch.Generator().manual_seed(0)
    ids = torch.full((72, 1), 1)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = parent.generate(ids, max_new_tokens=63, do_sample=True, eos_token_id=None)
    calibration = ids[torch.randperm(len(ids), generator=g)[:16]]
    convert(parent, tmp_path, calibration=calibration)
    model, _ = load_elastic(tmp_path)
    table = make_table(model.elastic)
    options = replace(OPTIONS, targets=(0.5, 0.7, 0.9, 1.0), steps=40, latency_weight=10.0)
    result = train_adaptive(model, {"prefill": table}, uniform_ladder(model.elastic), ids, options)
    for t in result.targets:
        assert t.loss < t.static_loss and abs(t.fraction / t.target - 1) < 0.05, t
    assert sum(t.static_loss - t.loss for t in result.targets) > 0.5


def test_the_model_is_left_as_it_was(model, tables):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    dial, state = model.dial, torch.get_rng_state()
    run(model, tables, steps=2)
    assert model.dial == dial and model.adaptive is None and not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_the_same_seed_gives_the_same_router_and_every_option_changes_it(model, tables, monkeypatch):
    monkeypatch.setattr(adaptive, "_SURROGATE_STEPS", 20)  # how well it fits is another test's
    monkeypatch.setattr(adaptive, "_REFIT_STEPS", 5)

    def weights(**changes):
        small = {"steps": 2, "calibration": 4, "judged": 4}
        result = run(model, {"prefill": tables["prefill"]}, **small | changes)
        return json.dumps([result.router.w1.tolist(), result.router.base.tolist(), result.router.calibration])

    first = weights()
    assert weights() == first
    changes = [
        {"form": "surrogate"}, {"targets": (0.6, 1.0)}, {"gates": "hard"}, {"steps": 3}, {"lr": 1e-2},
        {"hidden": 4}, {"batch": 4}, {"latency_weight": 0.0}, {"calibration": 8}, {"judged": 8}, {"seed": 1},
    ]  # fmt: skip
    of_surrogate = [{"prefill": 18}, {"threshold": 1e-9}, {"threshold": 1e-9, "patience": 0.0}]
    assert {name for change in changes + of_surrogate for name in change} == set(
        AdaptiveConfig.__dataclass_fields__
    )
    for change in changes:
        assert weights(**change) != first, change
    small = {"form": "surrogate", "prefill": 12, "threshold": 1e3}
    found = [weights(**small)] + [weights(**small | change) for change in of_surrogate]
    assert found[0] == weights(**small) and found[1] != found[0] and found[2] not in (found[0], found[3])


@pytest.fixture(scope="module")
def by_surrogate(model, tables):
    return run(model, {"prefill": tables["prefill"]}, form="surrogate", threshold=0.05)


def test_the_surrogate_predicts_what_shares_cost(by_surrogate):
    """Random mixtures and the router's own choices, on sequences drawn for each: R² 0.93, rank 0.95 here."""
    fit = by_surrogate.surrogate
    assert fit.n == (200 + 60 + by_surrogate.gate.waited) // 6
    assert fit.r2 > 0.8 and fit.rank > 0.85, fit


def test_the_router_waits_while_the_surrogate_errs(model, tables, by_surrogate):
    gate = by_surrogate.gate
    assert gate.steps_below + gate.steps_above == 60 and gate.passed
    small = {"form": "surrogate", "steps": 4, "prefill": 12, "calibration": 4, "judged": 4}
    for patience, waited in ((0.5, 2), (0.0, 0)):
        gate = run(model, {"prefill": tables["prefill"]}, **small, threshold=1e-9, patience=patience).gate
        assert (gate.waited, gate.steps_below, gate.steps_above) == (waited, 0, 4) and not gate.passed


def test_shares_do_not_lose_to_where_the_router_started(by_surrogate):
    for t in by_surrogate.targets:
        assert t.loss < t.static_loss + 0.02 and abs(t.fraction / t.target - 1) < 0.05, t


def test_no_gradient_passes_the_model_where_a_surrogate_stands_for_it(model, tables, monkeypatch):
    passed = []
    forward = model.forward

    def watched(*args, **kwargs):
        out = forward(*args, **kwargs)
        passed.append(out.logits.requires_grad)
        return out

    monkeypatch.setattr(model, "forward", watched)
    small = {"steps": 2, "prefill": 12, "calibration": 4, "judged": 4, "threshold": 1e3}
    result = run(model, {"prefill": tables["prefill"]}, form="surrogate", **small)
    assert passed and not any(passed)
    assert float(result.router.w2.abs().max()) > 0  # and yet it has learnt
    passed.clear()
    run(model, {"prefill": tables["prefill"]}, steps=1, calibration=4, judged=4)
    assert any(passed)


def test_targets_that_are_too_fast_are_named(trained):
    assert trained.dropped_targets == (0.3,)
    assert trained.router.targets == (0.6, 0.8, 1.0)


def test_an_untrained_router_is_the_static_one(model, tables):
    ladder, table = uniform_ladder(model.elastic), tables["prefill"]
    router, _ = adaptive.start_router(model.elastic, table, ladder, OPTIONS)
    x = torch.randn(2, 3, 32)
    for i, target in enumerate(router.targets):
        rung = ladder.highest(table.predict, target * table.full_ms)
        for layer in range(2):
            logits = router.logits(x, layer, router.context(torch.tensor([target]), layer))
            widths = model.elastic.mlp_choices[int(logits.mlp.argmax(-1).unique())]
            assert (widths, i) == (rung.mlp[layer], i)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"targets": (0.5, 0.8)}, "targets must ascend from above 0 to 1"),
        ({"gates": "none"}, "gates must be one of soft, hard, got 'none'"),
        ({"form": "search"}, "form must be one of gumbel, surrogate, got 'search'"),
        ({"form": "surrogate", "gates": "hard"}, "gates must be soft with the form surrogate, got 'hard'"),
        ({"prefill": 5}, "prefill must be at least 12, got 5"),
        ({"patience": -0.1}, "patience must be at least 0, got -0.1"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"latency_weight": -1}, "latency_weight must be at least 0, got -1"),
    ],
)
def test_bad_options_are_refused(change, sentence):
    with pytest.raises(ValueError, match=f"AdaptiveConfig: {sentence}"):
        replace(OPTIONS, **change)


def test_too_little_text_is_refused(model, tables):
    with pytest.raises(ValueError, match=r"tokens must be at least 32 sequences .* got \[31, 48\]"):
        train_adaptive(model, tables, uniform_ladder(model.elastic), text(31), OPTIONS)


def test_tokens_of_one_choice_cost_what_the_table_says(tables, model):
    table, c = tables["prefill"], model.elastic
    for i, n in ((0, 0), (2, 1), (3, 0)):
        same = Indices(torch.full((2, 5, 2), i), torch.full((2, 5, 2), n))
        assert float(table.of_tokens(same)) == pytest.approx(table.predict(c.uniform(i, n)))


def test_prefill_takes_the_mean_and_decode_the_widest_of_the_batch(tables, model):
    c = model.elastic
    small, full = c.smallest(), c.full()
    choices = Indices(torch.zeros(2, 3, 2, dtype=torch.long), torch.zeros(2, 3, 2, dtype=torch.long))
    choices.mlp[1], choices.heads[1] = 3, 1  # the second sequence is full, at every token
    prefill, decode = tables["prefill"], tables["decode"]
    mean = (prefill.predict(small) + prefill.predict(full)) / 2
    assert float(prefill.of_tokens(choices)) == pytest.approx(mean)
    assert float(decode.of_tokens(choices)) == pytest.approx(decode.predict(full))
    alone = replace(decode, workload=Workload.decode(64))
    assert float(alone.of_tokens(choices)) == pytest.approx((alone.predict(small) + alone.predict(full)) / 2)


def test_adaptive_budgets_count_what_choosing_takes(model, tables):
    """Routers that add a fifth of the full time: the calibrated fraction, the training's and the planner's have it."""
    plain = tables["prefill"]
    table = replace(plain, adaptive=(plain.base + plain.full_ms / 5, plain.slope))
    c, everything = model.elastic, torch.full((1, 5, 2), 0)
    smallest = Indices(everything, everything)
    fastest = plain.smallest_ms / plain.full_ms + 0.2
    assert float(table.of_tokens(smallest)) / table.full_ms == pytest.approx(fastest)
    certain = [torch.nn.functional.one_hot(axis[0, 0], len(m)).double() for axis, m in
               zip(smallest, (c.mlp_choices, c.head_choices), strict=True)]  # fmt: skip
    assert float(table.expected(*certain, adaptive=True)) / table.full_ms == pytest.approx(fastest)
    assert float(table.expected(*certain)) == pytest.approx(plain.smallest_ms)
    assert table.fraction(c.smallest()) == plain.fraction(c.smallest())
    planner = Planner(c, [table])
    assert planner.target(fastest + 0.01) == pytest.approx(fastest + 0.01)
    assert planner.target(latency_ms=0.9 * plain.full_ms) == pytest.approx(0.9)
    with pytest.raises(ValueError, match=f"fraction must be at least {fastest:.2f}"):
        planner.target(fastest - 0.01)
    result = run(model, {"prefill": table}, steps=2)
    assert result.dropped_targets == tuple(t for t in OPTIONS.targets if t < fastest)
    assert result.router.calibration["prefill"][0][0] == pytest.approx(fastest)
    training = adaptive._Training(
        model, table, uniform_ladder(c), text(40), replace(OPTIONS, steps=1), lambda *_: None
    )
    assert float(training._fraction(Probabilities(*certain))) == pytest.approx(fastest)
    model.attach_router(result.router)
    try:
        found = fractions(model, table, text(64, seed=7), [0.8, 0.9], "prefill")
        bare = fractions(model, plain, text(64, seed=7), [0.8, 0.9], "prefill")
    finally:
        model.attach_router(None)
        model.set_widths(c.full())
    torch.testing.assert_close(found, bare + 0.2, atol=1e-6, rtol=0)
    assert ((found / torch.tensor([0.8, 0.9]) - 1).abs() < 0.05).all()


def test_budgets_of_latency_become_fractions(model, tables):
    planner, table = Planner(model.elastic, tables.values()), tables["prefill"]
    half = (table.smallest_ms + table.full_ms) / 2
    assert planner.target(latency_ms=half) == pytest.approx(half / table.full_ms)
    assert planner.target(tokens_per_s=128e3 / half) == pytest.approx(half / table.full_ms)
    assert planner.target(0.7, phase="decode") == 0.7
    assert planner.target(latency_ms=10 * half) == 1.0
    for budget in ({"fraction": 0.01}, {"latency_ms": 1e-3}, {"tokens_per_s": 1e9}):
        with pytest.raises(ValueError, match=r"must be at (least|most) .* \(the fastest network\)"):
            planner.target(**budget)
    with pytest.raises(ValueError, match="exactly one of fraction, latency_ms, tokens_per_s must be given"):
        planner.target()
