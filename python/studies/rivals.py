"""Rivals at equal tokens and equal predicted cost: one network made for one size, beside one training for all sizes.

Each rival prunes the parent to one size by a published criterion, with and without a refit of what is left, and may
then spend all training tokens on that size. Ours spends as many once, for every size. Budgets are multiplications in
the decoder's layers, as shares of the parent's. Rows are appended as they are finished, and none is done twice:

    python python/studies/rivals.py study/rivals
    python python/studies/rivals.py study/rivals --parent smollm2 --arms FLAP,uniform --budgets 0.7
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flextron import pipeline, ui
from flextron.artefacts.directory import load_elastic
from flextron.artefacts.ladder import Ladder, uniform_ladder
from flextron.artefacts.latency_table import LatencyTable
from flextron.checkpoint import read_lines
from flextron.config import ElasticConfig, Widths
from flextron.conversion.importance import Importance
from flextron.conversion.refit import refit, refitted
from flextron.conversion.reorder import reorder, sorted_orders
from flextron.corpus import Corpus, windows
from flextron.data import split_documents
from flextron.judge.loss import restored, sequence_losses
from flextron.nn import elastic_config, make_elastic
from flextron.nn.protocol import Elastic
from flextron.routing.static import train_routers
from flextron.training import train as train_model
from flextron_lab.demo.parents import load_parent
from flextron_lab.demo.run import plan_for
from flextron_lab.study import texts
from flextron_lab.study.arithmetic import arithmetic_table

ROWS = "rows.jsonl"
PRUNED = ("FLAP", "Wanda", "ShortGPT")
OURS = ("routed", "uniform", "full")
ARMS = (*PRUNED, *OURS)
LENGTH, CALIBRATION, JUDGED = 256, 48, 24  # tokens of a sequence; sequences of each
STEPS = 48  # widths that a pruned MLP may have: a model's neurons are divided so
Row = dict[str, Any]
Progress = Callable[[str, int, int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the study")
    parser.add_argument("--parent", choices=("stories15m", "smollm2"), default="stories15m")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--budgets", default="0.9,0.7,0.5")
    parser.add_argument(
        "--trained", default="0,1", help="0: without training; 1: with the tokens of the demonstration"
    )
    parser.add_argument("--refits", default="0,1", help="0: as pruned; 1: what is left is fitted anew")
    parser.add_argument("--seeds", default="0", help="of what is trained")
    args = parser.parse_args()
    with ui.reporter() as progress:
        study = Study(args.out, args.parent, progress)
        args.out.mkdir(parents=True, exist_ok=True)
        budgets = [float(b) for b in args.budgets.split(",")]
        for trained in map(int, args.trained.split(",")):
            for seed in map(int, args.seeds.split(",")) if trained else (0,):
                for arm in args.arms.split(","):
                    for again in map(int, args.refits.split(",")):
                        study.do(arm, bool(again), bool(trained), seed, budgets)
        study.show()


# ---- what is pruned


@dataclass(frozen=True)
class Statistics:
    """What a parent's layers compute on calibration text.

    Attributes:
        neurons, heads: for each layer (mean, variance, mean square), [features] each, of what the last projection of
            its MLP and of its attention reads.
        influence: [L], 1 - the mean cosine of what a layer is given and what it gives.
    """

    neurons: list[tuple[Tensor, Tensor, Tensor]]
    heads: list[tuple[Tensor, Tensor, Tensor]]
    influence: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, tokens: Tensor) -> Statistics:
        layers = model.model.layers
        sums: dict[tuple[str, int], list[Tensor]] = {}
        influence, handles = torch.zeros(len(layers), dtype=torch.float64), []

        def see(key: tuple[str, int], x: Tensor) -> None:
            x = x.flatten(0, -2).double()
            own = sums.setdefault(key, [torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(2)])
            own[0] += x.sum(0)
            own[1] += x.square().sum(0)

        for i, layer in enumerate(layers):
            for name, module in (("neurons", layer.mlp.down_proj), ("heads", layer.self_attn.o_proj)):
                key = (name, i)
                handles.append(module.register_forward_pre_hook(lambda _, args, key=key: see(key, args[0])))
        last: list[Tensor] = []  # what the last layer gives: the hidden states have it behind the norm alone
        handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0])))
        for batch in tokens.split(4):
            states = model.model(batch, use_cache=False, output_hidden_states=True).hidden_states[:-1]
            for i, (x, y) in enumerate(zip(states, [*states[1:], last.pop()], strict=True)):
                influence[i] += (1 - torch.cosine_similarity(x, y, dim=-1)).double().sum()
        for handle in handles:
            handle.remove()
        n = tokens.numel()

        def moments(name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
            found = []
            for i in range(len(layers)):
                total, square = sums[name, i]
                mean = total / n
                found.append((mean, square / n - mean.square(), square / n))
            return found

        return cls(moments("neurons"), moments("heads"), influence / n)


@torch.no_grad()
def flap(model: Any, seen: Statistics) -> tuple[list[Tensor], list[Tensor]]:
    """The scores of neurons and of heads by fluctuation (An et al., AAAI 2024): larger is more important.

    ``variance of the feature * |its column of the last projection|^2``, standardised in each layer and module, so that
    one threshold serves them all; a head has the mean of its features.
    """

    def score(variance: Tensor, weight: Tensor) -> Tensor:
        value = variance * weight.double().square().sum(0)
        return (value - value.mean()) / value.std()

    layers = model.model.layers
    neurons = [
        score(v, layer.mlp.down_proj.weight) for (_, v, _), layer in zip(seen.neurons, layers, strict=True)
    ]
    heads = [
        score(v, layer.self_attn.o_proj.weight) for (_, v, _), layer in zip(seen.heads, layers, strict=True)
    ]
    return neurons, [h.view(model.config.num_attention_heads, -1).mean(1) for h in heads]


@torch.no_grad()
def wanda(model: Any, seen: Statistics) -> tuple[list[Tensor], list[Tensor]]:
    """The scores by weights and activations (Sun et al., ICLR 2024), of whole inputs: ``sum_i |W_ij| |x_j|_2``."""

    def score(square: Tensor, weight: Tensor) -> Tensor:
        return weight.double().abs().sum(0) * square.sqrt()

    layers = model.model.layers
    neurons = [
        score(s, layer.mlp.down_proj.weight) for (*_, s), layer in zip(seen.neurons, layers, strict=True)
    ]
    heads = [
        score(s, layer.self_attn.o_proj.weight) for (*_, s), layer in zip(seen.heads, layers, strict=True)
    ]
    return neurons, [h.view(model.config.num_attention_heads, -1).sum(1) for h in heads]


def by_threshold(config: ElasticConfig, table: LatencyTable, scored: Importance, budget: float) -> Widths:
    """What lies above the lowest threshold for all layers that keeps to the budget; at least the narrowest width."""
    M = config.heads_per_group
    groups = [scores / M for scores in scored.groups(config.num_kv_heads)]  # the mean over a group's heads

    def kept(threshold: float) -> Widths:
        def nearest(menu: Sequence[int], n: int) -> int:
            return min(menu, key=lambda width: abs(width - n))

        return Widths(
            tuple(nearest(config.mlp_choices, int((s > threshold).sum())) for s in scored.neurons),
            tuple(nearest(config.head_choices, int((s > threshold).sum())) for s in groups),
        )

    candidates = torch.cat([*scored.neurons, *groups]).sort().values
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if table.fraction(kept(float(candidates[middle]))) <= budget else (middle + 1, high)
        )
    return kept(float(candidates[low]))


def alike(config: ElasticConfig, table: LatencyTable, budget: float) -> Widths:
    """One share of the neurons and of the groups in every layer; what whole groups leave over goes to the neurons."""
    found = None
    for heads in config.head_choices:
        for mlp in config.mlp_choices:
            own = Widths((mlp,) * config.num_layers, (heads,) * config.num_layers)
            gap = abs(mlp / config.intermediate_size - heads / config.max_heads)
            if table.fraction(own) <= budget and (found is None or (gap, -mlp) < found[0]):
                # among networks within the budget that cannot grow: the one whose shares differ least
                wider = [m for m in config.mlp_choices if m > mlp]
                grown = wider and table.fraction(Widths((wider[0],) * config.num_layers, own.heads)) <= budget
                if not grown:
                    found = (gap, -mlp), own
    if found is None:
        raise ValueError(f"rivals: budgets must be within reach of alike layers, got {budget}")
    return found[1]


def by_depth(config: ElasticConfig, table: LatencyTable, influence: Tensor, budget: float) -> Widths:
    """Without the layers of least influence, as many as the budget asks for (ShortGPT, Men et al. 2024)."""
    mlp, heads = list(config.full().mlp), list(config.full().heads)
    for layer in influence.argsort().tolist():
        if table.fraction(Widths(tuple(mlp), tuple(heads))) <= budget:
            break
        mlp[layer] = heads[layer] = 0
    return Widths(tuple(mlp), tuple(heads))


# ---- the study


@dataclass(frozen=True)
class Study:
    """One parent's rivals, whose rows are in ``rows.jsonl`` of a folder."""

    out: Path
    parent: str
    progress: Progress

    @cached_property
    def source(self) -> Any:
        return load_parent(self.parent, progress=self.progress)

    @cached_property
    def plan(self) -> Any:
        """The demonstration's settings, for all arms."""
        return plan_for(sum(p.numel() for p in self.source.model.parameters()), 0)

    @cached_property
    def corpus(self) -> Corpus:
        """What is calibrated and trained on; the other part is the first judge's."""
        tokenizer = self.source.tokenizer
        if self.parent == "stories15m":
            parts = split_documents(texts.tiny_stories(), 0.15)
            return Corpus(*(texts.story_tokens(part, tokenizer) for part in parts))
        return Corpus(
            texts.textbooks(tokenizer, 400_000), texts.judge("openstax", tokenizer, 4 * JUDGED * LENGTH)
        )

    @cached_property
    def judges(self) -> dict[str, Tensor]:
        if self.parent == "stories15m":
            return {"stories": windows(self.corpus.held_out, JUDGED, LENGTH)}
        tokenizer, room = self.source.tokenizer, 4 * JUDGED * LENGTH
        return {
            name: windows(texts.judge(name, tokenizer, room), JUDGED // 2, LENGTH) for name in texts.JUDGES
        }

    @cached_property
    def calibration(self) -> Tensor:
        return windows(self.corpus.train, CALIBRATION, LENGTH)

    @cached_property
    def seen(self) -> Statistics:
        return Statistics.of(self.source.model, self.calibration)

    @cached_property
    def teacher(self) -> Any:
        return self.source.model.eval().requires_grad_(False)

    def training(self, seed: int) -> Any:
        return replace(self.plan.train, seed=seed, checkpoint_every=10)

    # ---- rows

    def rows(self) -> list[Row]:
        path = self.out / ROWS
        return [*read_lines(path)] if path.exists() else []

    def do(self, arm: str, again: bool, trained: bool, seed: int, budgets: Sequence[float]) -> None:
        """Append the rows that are not there yet."""
        facts = {"parent": self.parent, "arm": arm, "refit": again, "trained": trained, "seed": seed}
        budgets = (1.0,) if arm == "full" else budgets
        done = {row["budget"] for row in self.rows() if facts.items() <= row["key"].items()}
        missing = [b for b in budgets if b not in done]
        if not missing or (again and arm in ("ShortGPT", "full")):  # in whole layers nothing is to be fitted
            return
        make = self._ours if arm in OURS else self._pruned
        for row in make(arm, again, trained, seed, missing):
            with (self.out / ROWS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": facts, **row}) + "\n")

    def _judged(
        self, name: str, model: Elastic, widths: Widths, table: LatencyTable, budget: float, tokens: int
    ) -> Row:
        losses = {}
        with restored(model), torch.no_grad():
            model.eval().set_widths(widths)
            for text, rows in self.judges.items():
                found = torch.cat([sequence_losses(model, batch) for batch in rows.split(4)])
                losses[text] = {"loss": float(found.mean()), "error": float(found.std() / len(found) ** 0.5)}
        self.progress(f"{name} at {budget:g}", 1, 1)
        return {
            "name": name,
            "budget": budget,
            "fraction": table.fraction(widths),
            "params": model.elastic.params(widths),
            "tokens": tokens,
            "losses": losses,
            **widths.to_dict(),
        }

    def _told(self, what: str) -> Callable[[int, int, dict[str, Any]], None]:
        return lambda step, steps, _: self.progress(what, step, steps)

    # ---- rivals

    def _pruned(
        self, arm: str, again: bool, trained: bool, seed: int, budgets: Sequence[float]
    ) -> Iterator[Row]:
        for budget in budgets:
            model, widths = self._prune(arm, again, budget)
            table, tokens = arithmetic_table(model.elastic, LENGTH), 0
            if again:
                refit(model, self.calibration, only=widths)
            if trained:
                config = replace(self.training(seed), networks=(widths,), full_probability=0.0)
                run = self.out / "runs" / f"{self.parent}-{arm}-{again:d}-{budget:g}-{seed}"
                report = train_model(
                    model,
                    self.corpus.train,
                    config,
                    run,
                    teacher=self.teacher if config.distillation else None,
                    progress=self._told(f"{arm} at {budget:g}"),
                )
                tokens = report.tokens
                shutil.rmtree(run)
            yield self._judged(arm, model, widths, table, budget, tokens)

    def _prune(self, arm: str, again: bool, budget: float) -> tuple[Elastic, Widths]:
        """The parent with its layers in a criterion's order, and the widths of the budget."""
        config = self.source.model.config
        F, G = config.intermediate_size, config.num_key_value_heads
        model = self._copy(biased=arm == "FLAP" and not again)
        if arm == "ShortGPT":
            elastic = elastic_config(model.config, "kv_group", (0, F), (0, G))
            own = by_depth(elastic, arithmetic_table(elastic, LENGTH), self.seen.influence, budget)
            return make_elastic(model, elastic), own
        grain = max(1, F // STEPS)
        menu = tuple(range(grain, F + 1, grain))
        elastic = elastic_config(model.config, "kv_group", menu, tuple(range(1, G + 1)))
        table = arithmetic_table(elastic, LENGTH)
        neurons, heads = (flap if arm == "FLAP" else wanda)(self.source.model, self.seen)
        scored = Importance(tuple(neurons), tuple(heads), arm, self.calibration.numel())
        widths = (
            by_threshold(elastic, table, scored, budget) if arm == "FLAP" else alike(elastic, table, budget)
        )
        orders = sorted_orders(scored, elastic)
        reorder(model, orders, elastic)
        if arm == "FLAP" and not again:
            self._compensate(model, orders, widths, elastic)
        return make_elastic(model, elastic), widths

    def _copy(self, biased: bool) -> Any:
        """A copy of the parent; with biases of zero, of which only those of the last projections are trained."""
        source = self.source.model
        config = type(source.config).from_dict(
            source.config.to_dict() | {"attention_bias": biased, "mlp_bias": biased}
        )
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(source.get_parameter(name)) if not name.endswith("proj.bias") else p.zero_()
                p.requires_grad_(not name.endswith("proj.bias") or "o_proj" in name or "down_proj" in name)
        return model

    @torch.no_grad()
    def _compensate(self, model: Any, orders: list[Any], widths: Widths, config: ElasticConfig) -> None:
        """FLAP's bias: what the pruned features give in the mean."""
        D = config.head_dim
        for i, (layer, order) in enumerate(zip(model.model.layers, orders, strict=True)):
            features = (order.query_heads()[:, None] * D + torch.arange(D)).flatten()
            kept = config.query_heads(widths.heads[i]) * D
            for module, mean, n in (
                (layer.mlp.down_proj, self.seen.neurons[i][0][order.neurons], widths.mlp[i]),
                (layer.self_attn.o_proj, self.seen.heads[i][0][features], kept),
            ):
                module.bias.copy_(module.weight[:, n:] @ mean[n:].float())

    # ---- ours

    def _ours(
        self, arm: str, again: bool, trained: bool, seed: int, budgets: Sequence[float]
    ) -> Iterator[Row]:
        folder = self._made(trained, seed)
        model, _ = load_elastic(folder)
        table, tokens = arithmetic_table(model.elastic, LENGTH), 0
        if trained:
            config = self.training(seed)
            tokens = config.steps * config.batch_size * config.length * config.accumulation
        ladder = (
            self._ladder(folder, model, table, seed) if arm == "routed" else uniform_ladder(model.elastic)
        )
        for budget in budgets:
            widths = ladder.highest(table.predict, budget * table.full_ms)
            if widths is None:
                raise ValueError(f"rivals: budgets must be at least the smallest network's, got {budget}")
            with refitted(model, widths, self.calibration) if again else contextlib.nullcontext():
                yield self._judged(f"ours, {arm}", model, widths, table, budget, tokens)

    def _made(self, trained: bool, seed: int) -> Path:
        """Our checkpoint, converted and trained by the library's defaults."""
        base = self.out / f"{self.parent}-converted"
        if not (base / "made.json").is_file():
            pipeline.convert(
                self.source.model,
                base,
                data=self.corpus,
                tokenizer=self.source.tokenizer,
                samples=CALIBRATION,
                length=LENGTH,
                force=True,
                progress=self.progress,
            )
            (base / "made.json").write_text("{}")
        if not trained:
            return base
        folder = self.out / f"{self.parent}-trained-{seed}"
        if not folder.is_dir():
            shutil.copytree(base, folder)
        pipeline.train(folder, self.training(seed), data=self.corpus, progress=self.progress)
        return folder

    def _ladder(self, folder: Path, model: Elastic, table: LatencyTable, seed: int) -> Ladder:
        path = folder / "rivals-ladder.json"
        if not path.is_file():
            few = windows(self.corpus.train, self.plan.route_samples, self.plan.route_length)

            def loss(widths: Widths) -> float:
                with restored(model), torch.no_grad():
                    model.set_widths(widths)
                    return float(sequence_losses(model, few).mean())

            found = train_routers(
                model.elastic, table, loss, replace(self.plan.route, seed=seed), self.progress
            )
            path.write_text(json.dumps(found.ladder.to_dict()))
        return Ladder(**json.loads(path.read_text()))

    # ---- what came out

    def show(self) -> None:
        rows = [row for row in self.rows() if row["key"]["parent"] == self.parent]
        header = ["network", "refit", "tokens", "seed", "budget", "cost", "parameters", *self.judges]
        cells = [
            [
                r["name"],
                "yes" if r["key"]["refit"] else "",
                f"{r['tokens']:,}",
                str(r["key"]["seed"]),
                f"{r['budget']:g}",
                f"{r['fraction']:.3f}",
                f"{r['params'] / 1e6:.1f} M",
                *(f"{one['loss']:.3f} ({one['error']:.3f})" for one in r["losses"].values()),
            ]
            for r in sorted(rows, key=lambda r: (r["tokens"], r["budget"], r["name"], r["key"]["refit"]))
        ]
        ui.print_table(
            f"{self.parent}: nats per token, with the standard error over sequences", header, cells
        )


if __name__ == "__main__":
    main()
