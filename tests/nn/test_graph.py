"""One capture serves every budget: a stand-in for CUDA graphs on a CPU, which knows nothing but what was captured."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from nn.test_elastic_model import elastic, mixed, relative, tokens
from nn.test_generation import SETTINGS, Streamer, Turns, both, budget_and_hook
from nn.test_policy import left_padded, routed, three, turned
from nn.test_static_cache import static_cache
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flextron.config import Widths
from flextron.nn import StaticCache, graph, rooms

GREEDY = dict(max_new_tokens=10, do_sample=False, pad_token_id=0)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """`generate` takes the way that it takes on a GPU; steps run as Python runs them."""
    monkeypatch.setattr(rooms, "CAPTURED_ON", ("cpu",))


@pytest.fixture
def traced(monkeypatch):
    """A list of captures: of their operations, their tensors' addresses and their numbers, as a graph has them."""
    made: list[Any] = []

    def captured(run: Any, state: Any) -> Any:
        tensors, spec = pytree.tree_flatten(state)
        for _ in range(2):
            run(state)  # as a capture does; what it changes must be put right
        made.append(make_fx(lambda *tensors: run(pytree.tree_unflatten(list(tensors), spec)))(*tensors))
        return partial(made[-1], *tensors)

    monkeypatch.setattr(graph, "captured", captured)
    return made


@pytest.fixture
def counted(monkeypatch):
    """A list of captures, of steps that go on to run as Python runs them."""
    made, capture = [], graph.captured
    monkeypatch.setattr(graph, "captured", lambda *args: made.append(1) or capture(*args))
    return made


def ten(config: Any) -> list[Widths]:
    """Widths from the smallest to the full ones, other ones in each layer."""
    generator = torch.Generator().manual_seed(3)

    def drawn() -> Widths:
        return Widths(
            *(
                [menu[int(i)] for i in torch.randint(len(menu), (config.num_layers,), generator=generator)]
                for menu in (config.mlp_choices, config.head_choices)
            )
        )

    return [config.smallest(), *(drawn() for _ in range(8)), config.full()]


@pytest.mark.parametrize("page, batch", [(None, 1), (4, 3), (None, 16)])
def test_one_capture_serves_ten_budgets(page, batch, traced):
    model = routed(elastic("qwen3", "3:1", "query" if page else "kv_group", num_hidden_layers=2))
    cache = static_cache(model, batch + 1, 13, page)  # no more room than is needed
    ids, mask = left_padded() if batch == 3 else (tokens(batch, 9), None)
    settings = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)

    def check() -> None:
        expected = model.generate(ids, **settings)
        cache.reset()
        assert torch.equal(model.generate(ids, cache=cache, **settings), expected)

    budgets = ten(model.elastic)
    for i, widths in enumerate(budgets):
        model.set_widths(widths, ("selected", "all")[i % 2])
        check()
    for kv in ("selected", "all") if batch > 1 else ():
        model.set_widths([*budgets, *budgets][:batch], kv)
        check()
    assert len(traced) == 1
    for targets in ([0.3], [0.9], [0.2 + 0.04 * i for i in range(batch)]):
        turned(model, *targets)
        check()
    assert len(traced) == 2


def test_what_a_gpu_did_beyond_the_last_token_is_gone():
    """The host learns late that all sequences have ended."""
    model, (ids, mask) = elastic("llama", "3:1"), left_padded()
    settings = dict(
        attention_mask=mask, eos_token_id=[3, 7, 11, 20, 30, 31], **GREEDY | dict(max_new_tokens=24)
    )
    expected, cache = model.generate(ids, **settings), static_cache(model, 4, 40)
    assert torch.equal(model.generate(ids, cache=cache, **settings), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1 < 9 + 23


def test_a_capture_stays_within_the_room(traced):
    model, ids = elastic(num_hidden_layers=1), tokens(2, 9)
    settings = GREEDY | dict(max_new_tokens=2)
    cache = static_cache(model, 2, 10)  # of which the step fills the last
    assert torch.equal(model.generate(ids, cache=cache, **settings), model.generate(ids, **settings))
    assert cache.tokens == 10 and len(traced) == 1


def test_on_a_gpu_replays_give_what_the_step_gives(device, monkeypatch):
    """To the bit, in one capture; in float32 the modules' tokens too."""
    if device == "cpu":
        pytest.skip("needs a GPU")
    for dtype in (torch.float32, torch.bfloat16):
        model = routed(elastic("qwen3", "3:1")).to(device, dtype)
        ids, mask = (x.to(device) for x in left_padded())
        settings = dict(
            attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=60
        )
        before = graph.captures()
        dials = [partial(model.set_widths, widths, "all") for widths in ten(model.elastic)]
        dials += [partial(model.set_widths, three(model.elastic)), partial(turned, model, 0.4, 0.6, 0.8)]
        found = []
        for dial in dials:
            dial()
            found.append(model.generate(ids, **settings))
        assert graph.captures() == before + 2
        for i, dial in enumerate(dials):
            dial()
            with monkeypatch.context() as patch:
                patch.setattr(graph, "captured", partial)
                cache = StaticCache(model, 4, 256)
                assert torch.equal(model.generate(ids, cache=cache, **settings), found[i])
                patch.setattr(rooms, "CAPTURED_ON", ())
                if dtype == torch.float32:
                    assert torch.equal(model.generate(ids, **settings), found[i])


DIALS = ("adaptive", "requests", "mixed", "full")


@pytest.mark.parametrize("settings, dial", [*zip(SETTINGS, itertools.cycle(DIALS), strict=False)])
def test_the_tokens_are_those_of_transformers_loop(settings, dial, monkeypatch, on_a_gpu):
    model = routed(elastic("qwen3", "3:1"))
    ids, mask = left_padded()
    if dial == "adaptive":
        turned(model, 0.4, 0.6, 0.8)
    elif dial != "full":
        model.set_widths(mixed(model.elastic) if dial == "mixed" else three(model.elastic))
    assert torch.equal(*both(model, monkeypatch, ids, attention_mask=mask, **SETTINGS[settings]))


def test_a_room_is_used_again_and_grows(on_a_gpu, counted, monkeypatch):
    model = elastic(num_hidden_layers=1)
    model.generation_config.max_length = None
    ids = tokens(2, 7)
    for _ in range(2):
        model.generate(ids, **GREEDY)
    assert len(counted) == 1
    model.generate(tokens(3, 7), **GREEDY)  # other sequences, another room
    assert len(counted) == 2
    monkeypatch.setattr(rooms, "_AT_FIRST", 20)
    long = GREEDY | dict(max_new_tokens=260)
    found = model.generate(ids, **long)
    assert len(counted) == 3  # 256 tokens became 512
    monkeypatch.setattr(rooms, "CAPTURED_ON", ())
    assert torch.equal(found, model.generate(ids, **long))


def test_other_weights_are_captured_anew(on_a_gpu, counted):
    model, ids = elastic(num_hidden_layers=1), tokens(2, 7)
    model.generate(ids, **GREEDY)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    changed = model.generate(ids, **GREEDY)  # where they are
    assert len(counted) == 1
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert torch.equal(model.generate(ids, **GREEDY), changed)
    assert len(counted) == 2


def test_what_is_returned_is_not_written_again(on_a_gpu, monkeypatch):
    model, ids = elastic(), tokens(2, 6)
    asked = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, **GREEDY)
    mine = model.generate(ids, **asked)
    assert isinstance(mine.cache, StaticCache) and mine.cache.get_seq_length() == 15
    model.generate(ids.flip(0), **GREEDY)
    monkeypatch.setattr(rooms, "CAPTURED_ON", ())
    theirs = model.generate(ids, **asked)
    for name in ("scores", "logits"):
        assert relative(torch.stack(mine[name]), torch.stack(theirs[name])) < 1e-5
    with torch.no_grad():
        for ours, other in zip(mine.cache.layers, theirs.cache.layers, strict=True):
            assert relative(ours.keys[:2, :15], other.keys[:, :15]) < 1e-5


def test_the_modules_take_over_between_tokens(on_a_gpu, monkeypatch):
    """A budget, hooks that come and go, and a streamer: each at its token."""
    model, ids = elastic(), tokens(2, 6)
    results, seen = [], []
    for kinds in (("cpu",), ()):
        monkeypatch.setattr(rooms, "CAPTURED_ON", kinds)
        model.set_widths(model.elastic.full(), "all")
        streamer = Streamer()
        results.append(
            model.generate(
                ids,
                stopping_criteria=[Turns(budget_and_hook(model, seen))],
                **GREEDY | dict(max_new_tokens=12),
            ).tolist()
        )
        model.generate(ids[:1], streamer=streamer, **GREEDY)
        results[-1].append(streamer.seen)
        assert len(seen) == 2
        seen.clear()
    assert results[0] == results[1]


class Reads(TorchDispatchMode):
    """Counts the operations by which the host waits for a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique"):
            self.counts[name] += 1
        return op(*args, **(kwargs or {}))


def reads(model: Any, ids: Any, new: int, **options: Any) -> Counter[str]:
    with Reads() as mode:
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), **GREEDY | options | dict(max_new_tokens=new)
        )
    assert found.shape[1] == ids.shape[1] + new
    return mode.counts


@pytest.mark.parametrize("dial", ["requests", "adaptive"])
def test_the_host_reads_no_more_for_more_tokens(dial, on_a_gpu):
    """Beside the flag that a sequence goes on, which it reads when it has come."""
    model, ids = routed(elastic("qwen3", "3:1")), tokens(3, 6)
    model.set_widths(three(model.elastic)) if dial == "requests" else turned(model, 0.4, 0.6, 0.8)
    few, more = (reads(model, ids, new, eos_token_id=60) for new in (4, 30))
    assert few == more and few.total() <= 6  # most of them are transformers', of the mask and the arguments
    assert reads(model, ids, 30, eos_token_id=60, do_sample=True).total() > more.total() + 20  # they are seen


def test_a_step_to_time_stays_where_it_is(on_a_gpu, counted):
    """At whatever budget is set; several share a room, and graphs."""
    model, ids = routed(elastic("qwen3", "3:1")), tokens(3, 1)
    runs = [rooms.repeated(model, ids, 20) for _ in range(2)]
    (cache,) = rooms._filled.values()
    dials = [
        partial(model.set_widths, widths, "all") for widths in (*ten(model.elastic), three(model.elastic))
    ]
    for i, dial in enumerate([*dials, partial(turned, model, 0.4, 0.6, 0.8)]):
        dial()
        runs[i % 2]()
        (state,) = [step.state for step in cache.steps.values() if step.setting is model.settings.now()]
        state.ids[:3] = ids[:, 0]
        state.positions[:3] = 20
        with torch.no_grad():
            expected = model(ids, cache=cache, position_ids=torch.full((3, 1), 20)).logits[:, 0]
        cache.crop(-1)
        assert relative(runs[1 - i % 2](), expected) < 1e-5
        assert state.lengths.tolist() == [20, 20, 20, 0]
    assert len(counted) == 2
    assert rooms.repeated(model, tokens(3, 2), 20) is None
