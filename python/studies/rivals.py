"""Rivals at equal tokens and equal predicted cost: one network made for one size, beside one training for all sizes.

Each rival prunes the parent to one size by a published criterion, with and without a refit of what is left, and may
then spend all training tokens on that size. Ours goes the demonstration's way, routers, refit, training, once for every
size, with as many tokens in all. Budgets are multiplications in the decoder's layers, as shares of the parent's. A seed
draws the calibration text, the routers and the training's order. Rows are appended as they are finished, and none is
done twice; a training that was killed goes on:

    python python/studies/rivals.py study/rivals
    python python/studies/rivals.py study/rivals --parent smollm2 --seeds 0 --budgets 0.9,0.7
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import time
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
from flextron.artefacts.ladder import Ladder
from flextron.artefacts.latency_table import LatencyTable
from flextron.config import ElasticConfig, Widths
from flextron.conversion.importance import Importance
from flextron.conversion.refit_in_order import refit_in_order
from flextron.conversion.reorder import reorder, sorted_orders
from flextron.corpus import Corpus, windows
from flextron.data import split_documents
from flextron.judge.loss import divergence, restored, sequence_losses
from flextron.nn import elastic_config, make_elastic
from flextron.nn.protocol import Elastic
from flextron.routing.static import train_routers
from flextron.training import train as train_model
from flextron_lab.demo.parents import load_parent
from flextron_lab.demo.run import plan_for
from flextron_lab.study import texts
from flextron_lab.study.arithmetic import arithmetic_table
from flextron_lab.study.rows import append_row, rows_in

OURS, ROUTED = (
    "ours",
    "ours, one size",
)  # the ladder of all sizes, and a rung of it that is treated as a rival is
ARMS = ("FLAP", "Wanda", "ShortGPT", ROUTED, OURS)
LENGTH, CALIBRATION, JUDGED = 256, 48, 24  # tokens of a sequence; sequences of each
DRAWS = 3  # samples of calibration text without a token in common, which seeds take in turn
STEPS = 48  # widths that a pruned MLP may have: a model's neurons are divided so
ALONE = 1.0  # how much a rival counts in a fit beside its full network, which nobody needs
COLUMNS = (
    "parent", "network", "refit", "tokens", "seed", "budget", "cost", "params", "judge", "loss", "error",
)  # fmt: skip
Row = dict[str, Any]
Missing = set[tuple[bool, float]]  # (whether trained, budget)
Progress = Callable[[str, int, int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the study")
    parser.add_argument("--parent", choices=("stories15m", "smollm2"), default="stories15m")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--budgets", default="0.9,0.8,0.7,0.6,0.5")
    parser.add_argument(
        "--trained", default="0,1", help="0: without training; 1: with the tokens of the demonstration"
    )
    parser.add_argument("--refits", default="1,0", help="0: as pruned; 1: what is left is fitted anew")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    with ui.reporter() as progress:
        for _ in cells(args, progress):
            if time.monotonic() > end:
                break
    write(args.out)
    show(args.out, args.parent)


def cells(args: argparse.Namespace, progress: Progress) -> Iterator[Row]:
    """Do all that is missing: seed by seed, so that a study that is cut short lacks seeds, not arms."""
    budgets = [float(b) for b in args.budgets.split(",")]
    for seed in map(int, args.seeds.split(",")):
        study = Study(args.out, args.parent, seed, progress)
        for again in map(int, args.refits.split(",")):
            for arm in args.arms.split(","):
                yield from study.do(arm, bool(again), {t == "1" for t in args.trained.split(",")}, budgets)


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
    """One parent's rivals and one seed, whose rows are in ``rows.jsonl`` of a folder."""

    out: Path
    parent: str
    seed: int
    progress: Progress

    @cached_property
    def source(self) -> Any:
        return load_parent(self.parent, progress=self.progress)

    @cached_property
    def plan(self) -> Any:
        """The demonstration's settings, for all arms."""
        return plan_for(sum(p.numel() for p in self.source.model.parameters()), self.seed)

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
        return windows(self.corpus.train, DRAWS * CALIBRATION, LENGTH)[self.seed % DRAWS :: DRAWS]

    @cached_property
    def seen(self) -> Statistics:
        return Statistics.of(self.source.model, self.calibration)

    @cached_property
    def teacher(self) -> Any:
        return self.source.model.eval().requires_grad_(False)

    # ---- rows

    def do(self, arm: str, again: bool, trained: set[bool], budgets: Sequence[float]) -> Iterator[Row]:
        """Append the rows that are not there yet, without training, with it or both, each once it is asked for."""
        facts = {"parent": self.parent, "arm": arm, "refit": again, "seed": self.seed}
        budgets = (*budgets, 1.0) if arm == OURS else budgets
        done = [(row["key"], row["budget"]) for row in rows_in(self.out)]
        missing = {
            (own, budget)
            for own in trained
            for budget in budgets
            if (facts | {"trained": own}, budget) not in done
        }
        make = self._ours if arm == OURS else self._rivals
        for own, row in make(arm, again, missing):
            row = {"key": facts | {"trained": own}, **row}
            append_row(self.out, row)
            yield row

    def _judged(self, name: str, model: Elastic, widths: Widths, budget: float, tokens: int) -> Row:
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
            "fraction": arithmetic_table(model.elastic, LENGTH).fraction(widths),
            "params": model.elastic.params(widths),
            "tokens": tokens,
            "losses": losses,
            **widths.to_dict(),
        }

    def _train(self, name: str, model: Elastic, run: Path, **options: Any) -> int:
        """Train for some networks, with the demonstration's settings; returns the number of tokens."""
        config = replace(self.plan.train, checkpoint_every=10, **options)
        report = train_model(
            model,
            self.corpus.train,
            config,
            run,
            teacher=self.teacher if config.distillation else None,
            progress=lambda step, steps, _: self.progress(name, step, steps),
        )
        return report.tokens

    def _run(self, *facts: object) -> Path:
        return self.out / "runs" / "-".join(map(str, (self.parent, self.seed, *facts)))

    # ---- rivals

    def _rivals(self, arm: str, again: bool, missing: Missing) -> Iterator[tuple[bool, Row]]:
        for budget in sorted({budget for _, budget in missing}, reverse=True):
            model, widths = self._prune(arm, again, budget)
            if again:
                refit_in_order(model, self.calibration, [widths], narrower=ALONE, ridge=self.plan.ridge)
            if (False, budget) in missing:
                yield False, self._judged(arm, model, widths, budget, 0)
            if (True, budget) in missing:
                name, run = f"{arm} at {budget:g}", self._run(arm, int(again), budget)
                tokens = self._train(name, model, run, networks=(widths,), full_probability=0.0)
                row = self._judged(arm, model, widths, budget, tokens)
                shutil.rmtree(run)
                yield True, row

    def _prune(self, arm: str, again: bool, budget: float) -> tuple[Elastic, Widths]:
        """The parent with its layers in a criterion's order, and the widths of the budget."""
        if arm == ROUTED:
            elastic, _ = load_elastic(self._converted())
            return elastic, self._rung(elastic, budget)
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

    def _ours(self, arm: str, again: bool, missing: Missing) -> Iterator[tuple[bool, Row]]:
        """The rungs of one ladder: fitted together, and trained together."""
        if not missing:
            return
        model, _ = load_elastic(self._converted())
        run = self._run(arm, int(again))

        def judged(trained: bool, tokens: int) -> Iterator[tuple[bool, Row]]:
            for budget in sorted(budget for own, budget in missing if own == trained):
                yield trained, self._judged(arm, model, self._rung(model, budget), budget, tokens)

        networks = tuple(self._rung(model, target) for target in self.plan.targets)
        if again:
            refit_in_order(
                model, self.calibration, networks, narrower=self.plan.narrower, ridge=self.plan.ridge
            )
        yield from judged(False, 0)
        if any(own for own, _ in missing):
            yield from judged(True, self._train(arm, model, run, networks=networks))
            shutil.rmtree(run)

    def _converted(self) -> Path:
        folder = self._run("converted")
        if not (folder / "made.json").is_file():
            pipeline.convert(
                self.source.model,
                folder,
                data=replace(self.corpus, train=self.calibration.flatten()),
                tokenizer=self.source.tokenizer,
                samples=CALIBRATION,
                length=LENGTH,
                force=True,
                progress=self.progress,
            )
            (folder / "made.json").write_text("{}")
        return folder

    def _rung(self, model: Elastic, budget: float) -> Widths:
        """What the routers choose; they are trained once, on the model as it was converted."""
        path, table = self._run("ladder.json"), arithmetic_table(model.elastic, LENGTH)
        if not path.is_file():
            few = windows(self.calibration.flatten(), self.plan.route_samples, self.plan.route_length)
            found = train_routers(
                model.elastic, table, divergence(model, few), self.plan.route, self.progress
            )
            path.write_text(json.dumps(found.ladder.to_dict()))
        ladder = Ladder(**json.loads(path.read_text()))
        return ladder.within(table.predict, budget * table.full_ms)


# ---- what came out


def write(out: Path) -> None:
    """Write every row's figures to ``rivals.csv``."""
    with (out / "rivals.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for r in rows_in(out):
            facts = (r["tokens"], r["key"]["seed"], r["budget"], round(r["fraction"], 4), r["params"])
            for judge, one in r["losses"].items():
                found = (round(one["loss"], 4), round(one["error"], 4))
                table.writerow((r["key"]["parent"], r["name"], int(r["key"]["refit"]), *facts, judge, *found))


def show(out: Path, parent: str) -> None:
    """Print nats per token by budget: the mean over seeds, with one standard deviation."""
    found: dict[str, dict[tuple[int, bool, str], dict[float, list[float]]]] = {}
    for r in rows_in(out):
        if r["key"]["parent"] == parent:
            network = (r["tokens"], r["key"]["refit"], r["name"])
            for judge, one in r["losses"].items():
                cells = found.setdefault(judge, {}).setdefault(network, {})
                cells.setdefault(r["budget"], []).append(one["loss"])
    for judge, networks in found.items():
        budgets = sorted({b for cells in networks.values() for b in cells})
        ui.print_table(
            f"{parent}, {judge}: nats per token, mean over seeds (standard deviation)",
            ["network", "refit", "tokens", *(f"{b:g}" for b in budgets)],
            [
                [name, "yes" if again else "", f"{tokens:,}", *(_spread(cells.get(b, [])) for b in budgets)]
                for (tokens, again, name), cells in sorted(networks.items())
            ],
        )


def _spread(losses: list[float]) -> str:
    if len(losses) < 2:
        return f"{losses[0]:.3f}" if losses else ""
    return f"{statistics.mean(losses):.3f} ({statistics.stdev(losses):.3f})"


if __name__ == "__main__":
    main()
