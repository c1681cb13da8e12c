"""Make a transformers causal LM elastic in place, and give it a budget dial."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.activations import ACT2FN
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.utils.hub import convert_file_size_to_int

from flextron.config import ElasticConfig, Widths, count, number, plain
from flextron.nn.anatomy import Anatomy, anatomy_of
from flextron.nn.cache import ElasticCache, given_cache
from flextron.nn.deadline import Held, Hold, Holding
from flextron.nn.drafting import (
    MOST,
    Costs,
    Drafting,
    drafted,
    drafting_now,
    drafts_by,
    fault_of_draft,
    fault_of_prompt,
)
from flextron.nn.elastic_attention import ElasticAttention
from flextron.nn.elastic_layer import ElasticLayer, make_layer_elastic, parts_of
from flextron.nn.elastic_mlp import ElasticMLP
from flextron.nn.families import elastic_config
from flextron.nn.forward import FORWARD, is_known, try_forward, wants_cache
from flextron.nn.generation import Asked, is_plain, sample
from flextron.nn.masks import is_left_padded, with_form, with_none, with_positions
from flextron.nn.mixin import Mixin, mixed
from flextron.nn.policy import Dial, PerRequest, PerToken, Policy
from flextron.nn.projection import (
    PackedLinear,
    check_conversion,
    check_parts,
    check_plain,
    fault_of_call,
    fault_of_stock,
    named,
)
from flextron.nn.protocol import Elastic, Planner, Writer
from flextron.nn.rooms import give_back, lend
from flextron.nn.rotary import forget, rotary_of
from flextron.nn.router import AdaptiveRouter, Indices
from flextron.nn.setting import Setting, Settings

KV_MODES = ("selected", "all")
_ONE_BY_ONE = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
)  # the ways of generating that `_sample` goes
_REFUSED = {"push_to_hub": False, "distributed_checkpoint": False, "safe_serialization": True}
_IGNORED = ("token", "save_peft_format", "save_original_format", "save_function")  # of what is not there
_CACHE = 3  # the place that most families give it
_ACTIVATIONS = ("act_fn", "activation_fn", "act")  # names of an MLP's activation


class ElasticModel(Mixin, PreTrainedModel, GenerationMixin):
    """Put in front of the class of a transformers causal LM by `make_elastic`.

    `set_budget`, `set_widths` and `turn` set the model for all threads, each from its next forward on. Inside ``with
    model.budget(...)`` or ``generate(..., budget=)`` they set that block alone, and no other thread sees it.

    Attributes:
        elastic: the menus of widths, and the shape of the full model.
        anatomy: how its layers are built.
        settings: what the model and its modules are set to.
        planner: turns budgets into widths; set by `flextron.from_pretrained`.
        writer: stores the model for `save_pretrained`; set by `flextron.from_pretrained` and `flextron.make_elastic`.
        stored: the dtype of each parameter in the file that the model was read from; empty where there was none.
        sidecar: the contents of the ``flextron.json`` beside that file; empty where there was none.
        adaptive: the router that chooses for every token; see `attach_router`. It is not a submodule, so the names of
            the ``state_dict`` stay the parent's.
    """

    elastic: ElasticConfig
    anatomy: Anatomy
    cache_place: int  # of the cache among the arguments of the family's forward
    settings: Settings
    planner: Planner | None
    writer: Writer | None
    stored: Mapping[str, torch.dtype]
    sidecar: Mapping[str, Any]
    adaptive: AdaptiveRouter | None

    @classmethod
    def members(cls, stock: Any) -> dict[str, Any]:
        return {"forward": _forward_of(stock), "cache_place": _place_of_cache(stock)}

    @property
    def dial(self) -> Dial:
        """The dial that the model was turned to."""
        return self.settings.now().dial

    @property
    def widths(self) -> Widths:
        """The widths of the layers now; where requests or tokens differ, the largest."""
        return self.settings.now().widths

    @property
    def kv(self) -> str:
        """``"selected"`` or ``"all"``: which key/value groups are projected and cached."""
        return self.settings.now().kv

    @property
    def held(self) -> Held | None:
        """The budget and time of every token of this thread's last generation that was held to a deadline."""
        return self.settings.held

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name != FORWARD
        }  # a copy gathers its own

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "copy.copy: an elastic model must be copied by copy.deepcopy, got a shallow copy, whose layers and budget "
            "would be the model's"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ElasticModel:
        """The conversion behind ``to``, ``half`` and ``cuda``; one that is refused changes nothing."""
        if isinstance(self.lm_head, PackedLinear):
            check_conversion(fn)
        self.__dict__.pop(FORWARD, None)  # its views of fused weights would keep the old ones
        before = self.device
        super()._apply(fn, recurse)
        # a policy's tensors must be on the device, too; a router's offsets cannot be read on meta
        decides = PerRequest if self.device.type == "meta" else PerRequest | PerToken
        if self.device != before and isinstance(self.settings.now().policy, decides):
            self.turn(self.dial)
        return self

    @property
    def decoder_layers(self) -> Any:
        """The list of the decoder's layers."""
        return self.anatomy.layers_in(self)

    def layers_of(self) -> list[ElasticLayer]:
        """The elastic modules of every layer, in order.

        Raises:
            NotImplementedError: one was replaced by a module that would not keep to a budget.
        """
        anatomy = self.anatomy
        found = [parts_of(anatomy, layer) for layer in self.decoder_layers]
        for i, layer in enumerate(found):
            for name, part, kind in zip(
                (anatomy.attention, anatomy.mlp), layer, (ElasticAttention, ElasticMLP), strict=True
            ):
                if not isinstance(part, kind):
                    raise NotImplementedError(
                        f"flextron: {anatomy.layer_path(i)}.{name} must be an {kind.__name__}, which keeps to the "
                        f"budget, got {named(part)}"
                    )
        return found

    def check_projections(self) -> None:
        """Refuse modules and hooks that an elastic layer would ignore: it reads projections and never calls them.

        Raises:
            NotImplementedError: the message names the module's path and class.
        """
        a = self.anatomy
        for i, (attention, mlp) in enumerate(self.layers_of()):
            path = a.layer_path(i)
            check_parts(f"{path}.{a.attention}", attention, attention.projections, a.head_norms)
            check_parts(a.path(path, a.mlp) if a.mlp else path, mlp, mlp.projections, a.experts)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str | None = None,
        **options: Any,
    ) -> None:
        """Write a whole elastic checkpoint, which stock transformers reads as the full parent. Trainer calls it.

        What the ``flextron.json`` that the model came from says of its conversion goes with it, and so do fields that
        this version does not know. Latency tables and routers of the directory that it came from are not copied.

        Args:
            save_directory: created when it is not there; other files in it stay.
            is_main_process: False: write nothing.
            state_dict: the parameters by name, where they were gathered elsewhere; tied ones may come twice.
                Each is stored in the dtype that it has here, or else in memory.
            max_shard_size: the largest size of a file of weights, ``"2GB"`` or bytes; None: the writer's own, 5 GB.
            options: transformers' other options, which must have their defaults.

        Raises:
            NotImplementedError: an option, packed weights, adapters that are not merged (PEFT's own model stores those
                alone), or a model that has no writer.
            ValueError: names or shapes in ``state_dict`` are not those of the model, or ``max_shard_size`` is no size.
        """
        check_plain("save_pretrained", self)
        for name, value in options.items():
            if name not in _IGNORED and value not in (None, _REFUSED.get(name)):
                raise NotImplementedError(
                    f"save_pretrained: {name} must be {_REFUSED.get(name)} with an elastic model, got {value!r}"
                )
        limit = None if max_shard_size is None else _shard_bytes(max_shard_size)
        tensors = self._to_store(state_dict)
        if self.writer is None:
            raise NotImplementedError(
                "save_pretrained: model must be one of flextron.from_pretrained or flextron.make_elastic, got one of "
                "flextron.nn.make_elastic, which builds models and writes no files"
            )
        if is_main_process:
            self.writer(self, save_directory, tensors, limit)

    def _to_store(self, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        own = {name: p.detach() for name, p in self.named_parameters()}
        if state_dict is None:
            return own
        missing = [name for name in own if name not in state_dict]
        unknown = [
            name for name in state_dict if name not in own and name not in (self._tied_weights_keys or ())
        ]
        other = [n for n in own if n in state_dict and state_dict[n].shape != own[n].shape]
        for fault, names in (("nothing for", missing), ("unknown", unknown), ("another shape of", other)):
            if names:
                raise ValueError(
                    f"save_pretrained: state_dict must have the model's parameters, got {fault} {names[0]}"
                    + (f" and {len(names) - 1} more" if names[1:] else "")
                )
        return {name: state_dict[name].detach() for name in own}

    def set_widths(self, widths: Widths | Sequence[Widths], kv: str = "selected") -> None:
        """Set the widths of every layer, one `Widths` for all or one for each request of a batch.

        No weight is copied; invalid widths change nothing.
        """
        self.turn(Dial(tuple(widths) if isinstance(widths, Sequence) else (widths,), kv))

    def turn(self, dial: Dial) -> None:
        """Set the model to a dial, such as one it had before. An invalid dial changes nothing."""
        self.settings.put(self._setting_at(dial))

    def _setting_at(self, dial: Dial) -> Setting:
        if not dial.widths:
            raise ValueError("set_widths: widths must be given for at least one request, got none")
        for widths in dial.widths:
            self.elastic.check(widths)
        if dial.kv not in KV_MODES:
            raise ValueError(f"set_widths: kv must be one of {', '.join(KV_MODES)}, got {dial.kv!r}")
        policy: Policy | None = None
        if dial.targets:
            policy = self._per_token(dial.targets, dial.phase)
        elif len(dial.widths) > 1:
            policy = PerRequest(dial.widths, self.device)
        return self._setting(dial, policy, dial.bound(), dial.kv)

    def _setting(self, dial: Dial, policy: Policy | None, bound: Widths, kv: str) -> Setting:
        kv_heads = tuple(self.elastic.kv_heads(n, kv) for n in bound.heads)
        return Setting(dial, bound, kv, kv_heads, policy)

    def set_policy(self, policy: Policy | None, bound: Widths, kv: str) -> None:
        """Let a policy decide, up to a bound; None: all tokens keep the bound. Training of routers calls this."""
        self.settings.put(self._setting(self.dial, policy, bound, kv))

    def attach_router(self, router: AdaptiveRouter | None) -> None:
        """Make ``router`` the one that chooses at adaptive budgets; None removes it."""
        object.__setattr__(self, "adaptive", router)  # a Module's own would make it a submodule

    def _per_token(self, targets: tuple[float, ...], phase: str) -> Policy:
        if self.adaptive is None:
            raise ValueError(
                "set_budget: adaptive needs an adaptive router; run `flextron route DIR --adaptive` first"
            )
        self.adaptive.check(self.elastic, phase)
        router = self.adaptive.to(self.device)
        with torch.no_grad():
            context = router.context(torch.tensor(targets, device=self.device), phase=phase)
        return PerToken(router, context, self.elastic)

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[Indices]]:
        """Record what the router chooses for every token of the forwards inside a ``with`` block.

        Yields a list that gets one entry for each forward: indices in the menus, ``mlp`` and ``heads`` [B, T, L] int64.
        """
        if not isinstance(self.settings.now().policy, PerToken):
            raise ValueError("watched: the budget must be adaptive, got one that chooses for no token")
        forwards: list[Indices] = []
        layers: list[Indices] = []

        def gather(*_: Any) -> None:
            if self.settings.now().watched is layers:  # no other thread's forward, nor one at another budget
                forwards.append(Indices(*(torch.stack(axis, dim=-1) for axis in zip(*layers, strict=True))))
                layers.clear()

        handle = self.register_forward_hook(gather)
        try:
            with self.settings.block(replace(self.settings.now(), watched=layers)):
                yield forwards
        finally:
            handle.remove()

    def set_budget(
        self,
        fraction: float | Sequence[float] | None = None,
        *,
        latency_ms: float | Sequence[float] | None = None,
        tokens_per_s: float | Sequence[float] | None = None,
        params: float | Sequence[float] | None = None,
        memory_gb: float | Sequence[float] | None = None,
        widths: Widths | Sequence[Widths] | None = None,
        adaptive: bool = False,
        phase: str = "prefill",
        batch: int | None = None,
        context: int | None = None,
        machine: str | None = None,
        kv: str | None = None,
        hold: bool = False,
        floor: Any = None,
    ) -> Widths | list[Widths] | float | list[float]:
        """Choose sub-networks by exactly one budget, for the whole batch or, by a list, for each request of it.

        Args:
            fraction: a share of the full model's measured latency, in (0, 1].
            latency_ms: milliseconds of one forward of the profiled phase.
            tokens_per_s: the same, as a rate.
            params: parameters of the sub-network; with ``kv="all"`` the key/value projections of all groups count.
            memory_gb: its weights and the key/value cache of ``batch`` sequences of ``context`` tokens, in 1e9 bytes.
            widths: the widths themselves.
            adaptive: let the adaptive router choose for every token and layer, so that the mean over tokens meets
                the budget, which must be one of latency.
            phase: ``"prefill"`` or ``"decode"``: which latency table.
            batch, context: sequences and tokens of the cache that ``memory_gb`` counts; default 1 and 0. For a budget
                of latency, sequences and tokens of a prompt or in the cache: the nearest profiled workload is meant,
                by default the smallest; more than a factor of two beyond what was profiled is refused.
            machine: the name of the machine whose latency tables are meant, as ``flextron info`` lists them; default:
                the machine that the model is on.
            kv: ``"selected"``: only key/value groups in use (of any request) are projected and cached; the default.
                ``"all"``: all are, so that the budget may rise during a generation; always so when ``adaptive`` or
                with ``hold``.
            hold: make ``latency_ms`` with ``phase="decode"`` a deadline for every step of `generate`: steps are
                measured as they run, and a slower machine gets smaller networks (`flextron.nn.deadline.Controller`).
                The table's choice is where it begins. `held` tells the budget of every token.
            floor: the smallest budget that ``hold`` may fall to, as `generate` takes a budget; None: the smallest
                network.

        Returns:
            The widths, with ``adaptive`` the fraction of the full latency; a list of them where the budget was one.

        Raises:
            ValueError: none or several budgets, or an impossible one (the message names the best possible).
        """
        budgets = {
            "fraction": fraction,
            "latency_ms": latency_ms,
            "tokens_per_s": tokens_per_s,
            "params": params,
            "memory_gb": memory_gb,
            "widths": widths,
        }
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"set_budget: exactly one budget must be given, got {', '.join(given) or 'none'}"
            )
        ((name, value),) = given.items()
        if (adaptive or hold) and kv not in (None, "all"):
            raise ValueError(
                f"set_budget: kv must be 'all' {'when adaptive' if adaptive else 'with hold'}, got {kv!r}"
            )
        if hold and (name != "latency_ms" or phase != "decode" or adaptive):
            raise ValueError(
                "set_budget: hold must be given with latency_ms and phase='decode', and not adaptive, "
                f"got {name} and phase={phase!r}{', adaptive' if adaptive else ''}"
            )
        if floor is not None and not hold:
            raise ValueError("set_budget: floor must be given with hold=True, got it without")
        kv = kv or ("all" if adaptive else "selected")
        value = plain(value)  # a row of NumPy's or torch's numbers is a list
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        values = list(value) if listed else [value]
        if name != "widths":
            values = [number(f"set_budget: {name}", v) for v in values]
        if not values:
            raise ValueError(f"set_budget: {name} must be given for at least one request, got none")
        options = {"phase": phase, "batch": batch, "context": context, "machine": machine}
        if adaptive:
            targets = [self._target(name, v, options) for v in values]
            self.turn(Dial.adaptive(self.elastic, targets, phase))
            return targets if listed else targets[0]
        if hold:
            if listed:
                raise ValueError(f"set_budget: latency_ms must be one number with hold, got {values}")
            return self._hold(options, floor, values[0], None)
        options |= {"kv": kv, "bytes_per_value": self.dtype.itemsize}
        found = [self._resolved(name, v, options) for v in values]
        self.turn(Dial(tuple(found), kv))
        return found if listed else found[0]

    def _hold(
        self, options: dict[str, Any], floor: Any, latency_ms: float | None, deadline_ms: float | None
    ) -> Widths:
        """Turn to a deadline of each step or of a whole generation, at the rung that keeps it by the table."""
        planner = self._planner("deadline_ms" if latency_ms is None else "latency_ms")
        rungs = planner.rungs(**options)
        lowest = 0
        if floor is not None:
            with self.budget(**(options | _by_name(floor))) as least:
                if not isinstance(least, Widths):
                    raise ValueError(f"set_budget: floor must be one budget for all tokens, got {floor!r}")
            lowest = next(i for i, (widths, _) in enumerate(rungs) if widths.covers(least))
        hold = Hold(rungs, lowest, latency_ms=latency_ms, deadline_ms=deadline_ms)
        if latency_ms is not None and rungs[lowest][1] > latency_ms:
            planner.resolve(latency_ms=latency_ms, **options)  # says so, where no network is fast enough
            raise ValueError(
                f"set_budget: latency_ms must be at least {rungs[lowest][1]:.4g}, which the floor takes, "
                f"got {latency_ms:g}"
            )
        rung = hold.lowest if latency_ms is None else hold.controller().begin(latency_ms)
        self.turn(hold.dial(rung))
        return hold.widths[rung]

    def _resolved(self, name: str, value: Any, options: dict[str, Any]) -> Widths:
        if name == "widths":
            return value
        if name == "fraction" and value == 1:
            return self.elastic.full()
        return self._planner(name).resolve(**{name: value}, **options)

    def _target(self, name: str, value: Any, options: dict[str, Any]) -> float:
        if name not in ("fraction", "latency_ms", "tokens_per_s"):
            raise ValueError(
                "set_budget: an adaptive budget must be one of latency (fraction, latency_ms, tokens_per_s), "
                f"got {name}; some token may need any weight"
            )
        return self._planner(name).target(**{name: value}, **options)

    def _planner(self, name: str) -> Planner:
        if self.planner is None:
            raise ValueError(
                f"set_budget: {name} needs a planner; load the model with flextron.from_pretrained"
            )
        weight = self.get_input_embeddings().weight
        return self.planner.at(weight.device, weight.dtype)

    @contextlib.contextmanager
    def budget(self, fraction: float | Sequence[float] | None = None, **kwargs: Any) -> Iterator[Any]:
        """`set_budget` for the length of a ``with`` block, in the thread that runs it.

        Other threads keep the model's own budget, or that of their own block.
        """
        with self.settings.block():
            yield self.set_budget(fraction, **kwargs)

    def generate(
        self,
        *args: Any,
        budget: Any = None,
        draft_budget: Any = None,
        draft_tokens: int | str | None = None,
        deadline_ms: float | None = None,
        floor: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate``, with a cache that keeps to the budget.

        Args:
            budget: holds for this call alone: a fraction or `Widths`, a list of them (one for each request), or
                arguments of `set_budget` by name, ``{"latency_ms": 12, "phase": "decode"}``. None: what the model is
                set to.
            draft_budget: a smaller budget, whose sub-network proposes tokens for the budget's to verify, see
                `flextron.nn.drafting`; in the same units, but one for all requests, and of the decode phase unless it
                says otherwise. Greedy tokens stay the same, sampled ones have the same distribution.
            draft_tokens: how many tokens to propose at once, at most, and at most 8; None or ``"auto"``: as many as
                pay, by the latency tables, measured steps and how many were accepted so far.
            deadline_ms: milliseconds for this whole call, for as many tokens as it may make: budgets change between
                tokens as the time that is left asks for. Where the floor cannot keep it, the rest runs at the floor.
                `held` tells the budget of every token.
            floor: the smallest budget that ``deadline_ms`` may lead to, as ``budget``; None: the smallest network.
        """
        if floor is not None and deadline_ms is None:
            raise ValueError("generate: floor must be given with deadline_ms, got it without")
        if deadline_ms is not None:
            limit = number("generate: deadline_ms", deadline_ms)
            if budget is not None or not 0 < limit < math.inf:
                raise ValueError(
                    "generate: deadline_ms must be a positive number, and given without a budget, got "
                    f"{deadline_ms!r}{'' if budget is None else f' and {budget!r}'}"
                )
            with self.settings.block():
                self._hold({"phase": "decode"}, floor, None, limit)
                return self.generate(*args, draft_budget=draft_budget, draft_tokens=draft_tokens, **kwargs)
        if budget is not None:
            with self.budget(**_by_name(budget)):
                return self.generate(*args, draft_budget=draft_budget, draft_tokens=draft_tokens, **kwargs)
        with drafts_by(self._drafting(draft_budget, draft_tokens, kwargs)):
            return self._generated(*args, **kwargs)

    def _drafting(self, budget: Any, tokens: int | str | None, kwargs: dict[str, Any]) -> Drafting | None:
        """What ``draft_budget`` and ``draft_tokens`` ask for."""
        wanted = None if tokens in (None, "auto") else count("generate: draft_tokens", tokens)
        if wanted is not None and not 1 <= wanted <= MOST:
            raise ValueError(f"generate: draft_tokens must be at least 1 and at most {MOST}, got {wanted}")
        if budget is None:
            if tokens is not None:
                raise ValueError("generate: draft_tokens must be given with a draft_budget, got none")
            return None
        if kwargs.get("custom_generate") is not None:
            raise ValueError("generate: draft_budget must be given without custom_generate, got both")
        chosen = self.settings.now()
        with self.settings.block():
            self.set_budget(**({"phase": "decode"} | _by_name(budget)))
            draft = self.settings.now()
        if chosen.dial.hold is not None or draft.dial.hold is not None:
            raise ValueError("generate: draft_budget must be given without a deadline, got both")
        fault = fault_of_draft(draft, chosen)
        if fault is not None:
            raise ValueError(f"generate: draft_budget {fault}")
        return Drafting(draft, wanted, partial(self._costs, draft.widths, chosen.widths))

    def _costs(self, draft: Widths, chosen: Widths, B: int) -> Costs:
        """What drafting for B sequences takes, by the latency tables, else by the weights that are read."""
        sizes = draft, chosen, B, MOST + 1
        known = None if self.planner is None else self._planner("draft_budget").steps(*sizes)
        if known is None:
            return Costs(self.elastic.params(draft) / self.elastic.params(chosen))
        return Costs(*known)

    def _generated(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate`` at what the model is set to."""
        settings = kwargs.get("generation_config") or self.generation_config
        kind = kwargs.get("cache_implementation") or settings.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"generate: cache_implementation must be None or 'dynamic', got {kind!r}; an ElasticCache is used"
            )
        asked = (kwargs.get("use_cache"), settings.use_cache, self.config.use_cache, True)
        kwargs["use_cache"] = next(bool(wanted) for wanted in asked if wanted is not None)
        if drafting_now() and not kwargs["use_cache"]:
            raise ValueError("generate: draft_budget must be given with a cache, got use_cache=False")
        if kwargs["use_cache"] and given_cache(kwargs) is None:
            kwargs["cache"] = ElasticCache()
            kwargs["cache"].is_own = True
        cache = given_cache(kwargs)
        try:
            return super().generate(*args, **kwargs)
        finally:
            if isinstance(cache, ElasticCache):
                cache.is_left_padded = False  # a later call may bring any mask

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if drafting_now() and generation_mode not in _ONE_BY_ONE:
            raise ValueError(
                "generate: draft_budget must be given with greedy or sampled generation, "
                f"got {generation_mode.value.replace('_', ' ')}"
            )
        # it is "dynamic" or None; beside a cache transformers wants None
        generation_config.cache_implementation = None
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if self.dial.hold is not None and generation_mode not in _ONE_BY_ONE:
            raise NotImplementedError(
                f"generate: a deadline must be held by greedy or sampled generation, got {generation_mode.value}"
            )
        cache, mask = model_kwargs.get("cache"), model_kwargs.get("attention_mask")
        takes_room = generation_mode in _ONE_BY_ONE and not drafting_now()
        if isinstance(cache, ElasticCache) and cache.is_own and takes_room:
            sequences = batch_size * generation_config.num_return_sequences
            cache = model_kwargs["cache"] = lend(self, sequences, max_cache_length) or cache
        if isinstance(cache, ElasticCache) and mask is not None and mask.device.type != "cpu":
            cache.is_left_padded = is_left_padded(mask)  # read once: generated tokens are visible

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **inputs: Any,
    ) -> Any:
        """Our own loop of greedy and sampled generation where it gives the same; else transformers', a slower one."""
        options = (logits_processor, stopping_criteria, generation_config)
        if drafting := drafting_now():
            fault = fault_of_prompt(self, input_ids, generation_config, inputs, synced_gpus)
            if fault is not None:
                raise ValueError(f"generate: draft_budget must be given with {fault}")
            return drafted(self, Asked(input_ids, *options, streamer, inputs), drafting)
        try:
            if not synced_gpus and is_plain(self, input_ids, generation_config, inputs):
                with self._holding(generation_config.max_length - input_ids.shape[1]) as holding:
                    return sample(self, Asked(input_ids, *options, streamer, inputs), holding)
            if self.dial.hold is not None:
                raise NotImplementedError(
                    "generate: a deadline must be held by the library's own loop, which takes a new prompt and a cache "
                    "of the model's own kind, got another call"
                )
            return super()._sample(input_ids, *options, synced_gpus, streamer, **inputs)
        finally:
            if not generation_config.return_dict_in_generate:  # else the caller gets it
                give_back(self, inputs.get("cache"))

    @contextlib.contextmanager
    def _holding(self, tokens: int) -> Iterator[Holding | None]:
        """A generation of at most so many tokens, held to the deadline that is set, where one is."""
        hold = self.dial.hold
        if hold is None:
            yield None
            return
        with self.settings.block():  # what moves is this generation's alone
            holding = Holding(self, hold, tokens)
            try:
                yield holding
            finally:
                self.settings.held = holding.record()


def _shard_bytes(size: int | str) -> int:
    """Bytes of the largest file of weights, which transformers' users give as a number or as ``"2GB"``."""
    try:
        found = convert_file_size_to_int(size)
    except (ValueError, AttributeError):
        found = 0
    if found < 1:
        raise ValueError(
            "save_pretrained: max_shard_size must be a number of bytes of at least 1, or a size such as 2GB, "
            f"got {size!r}"
        )
    return found


def _by_name(budget: Any) -> dict[str, Any]:
    """The budget of one call as arguments of `ElasticModel.set_budget`."""
    if isinstance(budget, Mapping):
        return dict(budget)
    budget = plain(budget)
    listed = isinstance(budget, Sequence) and len(budget) > 0
    return {"widths" if isinstance(budget[0] if listed else budget, Widths) else "fraction": budget}


def _place_of_cache(stock: type[PreTrainedModel]) -> int:
    """The place of the cache among the arguments of a causal LM's forward."""
    names = [*inspect.signature(stock.forward).parameters][1:]
    return names.index("cache") if "cache" in names else _CACHE  # a forward of one's own may not say


def _guard_cache(
    model: Elastic, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before every forward: give it an `ElasticCache` where it wants a cache; refuse one too small for the budget."""
    if model.settings.local() is not None and model.training and _runs_layers_again(model):
        raise NotImplementedError(
            "flextron: a budget must be set by set_budget with gradient checkpointing, which runs layers again outside "
            "of this block, got one of a with block or call"
        )
    if kwargs.get("output_attentions") or model.config.output_attentions:
        raise NotImplementedError(
            "flextron: output_attentions must be False, the weights are never materialised"
        )
    past = args[model.cache_place] if len(args) > model.cache_place else given_cache(kwargs)
    if past is None and wants_cache(model, kwargs):
        kwargs["cache"] = ElasticCache()
    elif past is not None:
        if not isinstance(past, ElasticCache):
            raise TypeError(f"flextron: cache must be an ElasticCache, got {type(past).__name__}")
        past.check(model.settings.now().kv_heads)
    return args, kwargs


def _runs_layers_again(model: Elastic) -> bool:
    return any(getattr(layer, "gradient_checkpointing", False) for layer in model.decoder_layers)


def _forward_of(stock: Any) -> Callable[..., Any]:
    """The forward of a class of causal LM: by the decoder op where that serves, else by the modules."""
    parameters = inspect.signature(stock.forward).parameters.values()
    names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD][1:]
    known = is_known(stock.forward)

    @wraps(stock.forward)  # transformers reads the signature
    def forward(self: ElasticModel, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(given) != len(args) + len(kwargs):
            return stock.forward(self, *args, **kwargs)  # it refuses too many arguments, and one given twice
        if self.anatomy.counted:
            given = with_positions(given)
        if torch.compiler.is_compiling():
            self.check_projections()
            return stock.forward(self, **with_none(with_form(given)))
        taken = try_forward(self, given) if known else None
        if taken is not None:
            return taken
        self.check_projections()
        with self.settings.forward():
            return stock.forward(self, **with_form(given))

    return forward


def _become(model: nn.Module, mixin: type[Mixin]) -> None:
    """Put a mixin in front of the class of a model that is there already.

    ``make_elastic`` works in place: optimisers, hooks and callers hold this very object, and `generate`,
    `save_pretrained` and the forward are looked up in its class. So its class is exchanged, as torch does it in
    `fully_shard` and `parametrize`. An attribute of the object would stop at pickling, and a new object would leave
    the old one with layers that its class does not know.
    """
    model.__class__ = mixed(mixin, type(model))


def make_elastic(model: PreTrainedModel, config: ElasticConfig | None = None) -> Elastic:
    """Make a transformers causal LM elastic, in place, at full width.

    The names and tensors of its ``state_dict`` do not change.

    Args:
        model: a causal LM of a family in `flextron.nn.anatomy.FAMILIES`.
        config: the menus of widths; by default those of `elastic_config`.

    Raises:
        NotImplementedError: a family or feature (dropout inside layers) that is not supported.
        ValueError: ``config`` describes another model, or the model is elastic already.
    """
    if isinstance(model, ElasticModel):
        raise ValueError("make_elastic: model must not be elastic already")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"make_elastic: model must be a transformers causal LM, got {type(model).__name__}")
    hf = model.config
    anatomy = anatomy_of(hf)
    own = elastic_config(model, config.unit, *config.menus) if config else elastic_config(model)
    if config is not None and own != config:
        mine = own.to_dict()
        wrong = [
            f"{k}={v!r} (model: {mine.get(k)!r})" for k, v in config.to_dict().items() if mine.get(k) != v
        ]
        raise ValueError(f"make_elastic: config must describe the model, got {', '.join(wrong)}")
    for name in ("is_causal", "return_dict"):  # transformers' own forward fails without the second
        if not getattr(hf, name, True):
            raise NotImplementedError(f"make_elastic: {name} must be True, got False")
    for name in anatomy.dropouts:
        if getattr(hf, name, 0.0):
            raise NotImplementedError(f"make_elastic: {name} must be 0, got {getattr(hf, name)}")

    activation = anatomy.activation_in(hf)
    expected = type(ACT2FN[activation])
    layers = anatomy.layers_in(model)
    for i, layer in enumerate(layers):
        mlp = anatomy.mlp_in(layer)
        parts = (anatomy.attention_in(layer), *([mlp] if anatomy.mlp else []))
        if foreign := next(filter(None, map(fault_of_stock, parts)), None):
            raise NotImplementedError(
                f"make_elastic: attention and MLP of {anatomy.layer_path(i)} must be transformers' own, for elastic "
                f"ones take their places and call neither, got {foreign}"
            )
        if anatomy.paired:  # their activation is no module
            continue
        owner = getattr(mlp, anatomy.experts[1]) if anatomy.experts else mlp
        name = next(name for name in _ACTIVATIONS if name in owner._modules)
        act = getattr(owner, name)
        if type(act) is not expected or fault_of_call(act):
            raise NotImplementedError(
                f"make_elastic: {anatomy.path(anatomy.path(anatomy.layer_path(i), anatomy.mlp), name)} must be "
                f"{activation!r} as configured, got {fault_of_call(act) or named(act)}"
            )
    if rotary := rotary_of(model, anatomy):
        forget(rotary)
    settings = Settings()
    for i, layer in enumerate(layers):
        layers[i] = make_layer_elastic(layer, anatomy, hf, activation, own, settings, i)
    count = sum(isinstance(m, ElasticAttention) for m in model.modules())
    if count != own.num_layers:
        raise ValueError(f"make_elastic: model must have {own.num_layers} elastic layers, got {count}")
    hf._attn_implementation = "flextron"
    _become(model, ElasticModel)
    model.elastic, model.anatomy = own, anatomy
    model.settings, model.planner, model.writer = settings, None, None
    model.stored = getattr(model, "stored", {})  # what it was read from may have said
    model.sidecar = {}
    model.attach_router(None)
    model.set_widths(own.full())
    model.register_forward_pre_hook(_guard_cache, with_kwargs=True)
    return model
