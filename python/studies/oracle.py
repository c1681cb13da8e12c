"""What could a choice for every token save, if the best one were known? The ceiling of adaptive routing.

Each token of held-out text takes one of the rungs of a static ladder. The oracle knows the loss that each rung would
give it, and spends a mean budget best, by a Lagrange multiplier; then the mixed choice is really run. Beside it:
choices of whole blocks and sequences, choices by what could be known before, the adaptive router of the library, and
the oracle's own choices shuffled among the tokens. All budgets are multiplications in the decoder's layers, not times:

    python python/studies/oracle.py study/oracle
    python python/studies/oracle.py study/oracle --stages layers      a choice for every token and layer, on a sample
    python python/studies/oracle.py study/oracle --stages draw

What a folder has already is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from flextron import pipeline, ui
from flextron.artefacts.adaptive_router import AdaptiveResult
from flextron.artefacts.directory import load_elastic
from flextron.artefacts.ladder import Ladder, uniform_ladder
from flextron.artefacts.latency_table import LatencyTable
from flextron.checkpoint import Origin
from flextron.checkpoint.hf import read_tokenizer
from flextron.checkpoint.io import read_json, write_json
from flextron.config import Widths
from flextron.corpus import Corpus, windows
from flextron.data import seeded, split_documents
from flextron.judge.loss import evaluate
from flextron.nn import Dial
from flextron.nn.policy import Given, Policy, menus_of
from flextron.nn.protocol import Elastic
from flextron.nn.router import Indices
from flextron.recipes import RouteConfig, TrainConfig
from flextron.routing.adaptive import train_adaptive
from flextron.routing.static import train_routers
from flextron_lab.demo.parents import load_parent
from flextron_lab.study import texts
from flextron_lab.study.arithmetic import arithmetic_table
from flextron_lab.study.plan import PLANS

PARENTS = ("stories15m", "smollm2")
LENGTH, BATCH = 256, 4
BUDGETS = (0.5, 0.65, 0.8, 0.9)
RUNGS = 13  # of the ladder, about evenly spaced in cost
BLOCK = 64  # tokens that choose together
STRIDE, SAMPLED = 8, 4  # layers: every eighth token moves at once; sequences
RIDGE = 1e-2

Rows = list[dict[str, Any]]
Progress = Callable[[str, int, int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the study")
    parser.add_argument("--parent", choices=PARENTS, default="stories15m")
    parser.add_argument(
        "--checkpoint", type=Path, help="an elastic checkpoint of the parent; by default one is trained"
    )
    parser.add_argument("--steps", type=int, default=120, help="training steps of the elastic model")
    parser.add_argument("--judged", type=int, default=24, help="sequences of 256 tokens that judge")
    parser.add_argument("--fitted", type=int, default=48, help="other sequences, that probes are fitted on")
    parser.add_argument("--stages", default="train,route,adaptive,losses,choose,decode,print")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ui.reporter() as progress:
        for stage in args.stages.split(","):
            STAGES[stage](
                Study(
                    args.out,
                    args.checkpoint or args.out / "elastic",
                    args.parent,
                    args.steps,
                    args.judged,
                    args.fitted,
                    progress,
                )
            )


@dataclass(frozen=True)
class Rungs:
    """The rungs that tokens choose from: choices [R, L] of each axis, and the cost of each.

    Attributes:
        static: cost [R] where all tokens take the rung, a share of the full model's.
        paid: cost [R] for one token among others that choose for themselves.
    """

    widths: list[Widths]
    choices: Indices
    static: Tensor
    paid: Tensor

    @classmethod
    def of(cls, ladder: Ladder, static: LatencyTable, choosing: LatencyTable, count: int) -> Rungs:
        costs = torch.tensor([static.fraction(w) for w in ladder.rungs])
        grid = torch.linspace(float(costs[0]), 1.0, count)
        places = sorted({int((costs - at).abs().argmin()) for at in grid})
        widths = [ladder.rungs[i] for i in places]
        indices = [static.elastic.indices(w) for w in widths]
        return cls(
            widths,
            Indices(*(torch.tensor(axis) for axis in zip(*indices, strict=True))),
            costs[places],
            torch.tensor([choosing.predict(w) / static.full_ms for w in widths]),
        )

    def policy(self, chosen: Tensor, model: Elastic) -> Policy:
        """The policy of tokens that take these rungs, [B, T]."""
        rows = chosen.flatten()
        return Given(Indices(*(axis[rows] for axis in self.choices)), menus_of(model.elastic, model.device))


@dataclass(frozen=True)
class Study:
    """One parent's study in a folder of its own."""

    out: Path
    folder: Path  # of the elastic checkpoint
    parent: str
    steps: int
    judged: int
    fitted: int
    progress: Progress

    @cached_property
    def model(self) -> Elastic:
        model, _ = load_elastic(self.folder)
        return model.eval().requires_grad_(False)

    def corpus(self, tokenizer: Any) -> tuple[Corpus, Tensor]:
        """(to train on, and to judge by; [n, 256] of neither, which routers and probes learn on)."""
        if self.parent == "stories15m":
            train, judged = split_documents(texts.tiny_stories(), 0.15)
            train, other = split_documents(
                train, 0.45
            )  # the hash spreads them: 0.45 of all, less those above
            own, rest, held_out = (texts.story_tokens(part, tokenizer) for part in (train, other, judged))
        else:
            needed = (
                200_000  # before which nothing is judged or fitted: what a training of some minutes reads
            )
            both = texts.textbooks(tokenizer, needed + (self.fitted + 1) * LENGTH)
            own, rest = both[:needed], both[needed:]
            held_out = texts.judge("openstax", tokenizer, 4 * self.judged * LENGTH)
        return Corpus(own, held_out), windows(rest, self.fitted, LENGTH)

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Sequences [n, 256] that judge, and others, on which routers and probes learn."""
        corpus, other = self.corpus(read_tokenizer(self.folder))
        return windows(corpus.held_out, self.judged, LENGTH), other

    @cached_property
    def tables(self) -> tuple[LatencyTable, LatencyTable]:
        """Multiplications where all tokens are alike, and where each chooses."""
        elastic = Origin.read(self.folder).elastic
        return arithmetic_table(elastic, LENGTH), arithmetic_table(elastic, LENGTH, choosing=True)

    @cached_property
    def ladder(self) -> Ladder:
        """The routers', or without them the uniform one."""
        if not self.has("ladder.json"):
            return uniform_ladder(self.model.elastic)
        return Ladder(**read_json(self.out / "ladder.json")["ladder"])

    @cached_property
    def rungs(self) -> Rungs:
        return Rungs.of(self.ladder, *self.tables, RUNGS)

    def has(self, name: str) -> bool:
        return (self.out / name).is_file()


# ---- the models


def train(study: Study) -> None:
    """Convert the parent and train it elastically, where no checkpoint is there."""
    if study.has("trained.json") or study.folder != study.out / "elastic":
        return
    parent = load_parent(study.parent, progress=study.progress)
    corpus, _ = study.corpus(parent.tokenizer)
    pipeline.convert(
        parent.model,
        study.folder,
        data=corpus,
        tokenizer=parent.tokenizer,
        samples=16,
        length=LENGTH,
        force=True,
        progress=study.progress,
    )
    config: TrainConfig = replace(
        PLANS["stories15m"].train, steps=study.steps, checkpoint_every=max(1, study.steps // 4)
    )
    report = pipeline.train(study.folder, config, data=corpus, progress=study.progress)
    write_json(study.out / "trained.json", {"tokens": report.tokens, "losses": report.losses})


def route(study: Study) -> None:
    """Train the static routers, whose ladder is the rival of every choice that depends on the token."""
    if study.has("ladder.json"):
        return
    model, (_, other) = study.model, study.tokens
    few = other[:: max(1, len(other) // 4)][:4]

    def loss(widths: Widths) -> float:
        return evaluate(model, few, [widths])[0]

    config: RouteConfig = replace(PLANS["stories15m"].route, evaluations=200, prefill=150)
    found = train_routers(model.elastic, study.tables[0], loss, config, study.progress)
    write_json(
        study.out / "ladder.json", {"ladder": found.ladder.to_dict(), "surrogate": found.surrogate.to_dict()}
    )


def adaptive(study: Study) -> None:
    """Train the adaptive router as the library does."""
    if study.has("adaptive/adaptive.json"):
        return
    _, other = study.tokens
    halves = other.view(-1, LENGTH // 2)
    found = train_adaptive(
        study.model,
        {"prefill": study.tables[1]},
        study.ladder,
        halves,
        replace(PLANS["stories15m"].adaptive, targets=(*BUDGETS, 1.0)),
        progress=study.progress,
    )
    (study.out / "adaptive").mkdir(exist_ok=True)
    found.save(study.out / "adaptive", Origin.read(study.folder))


# ---- losses of tokens


@torch.no_grad()
def token_losses(
    model: Elastic, ids: Tensor, set_to: Callable[[int], None], beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of the next token at each position, [n, T - 1], and its mean under probabilities ``beside``, else nothing.

    Args:
        ids: [n, T]; ``set_to(start)`` sets the model for the batch that begins at this sequence.
        beside: [n, T - 1, V], the full model's probabilities.
    """
    found, expected = [], []
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        set_to(start)
        log_q = model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        found.append(-log_q.gather(-1, batch[:, 1:, None])[..., 0])
        if beside is not None:
            expected.append(-(beside[start : start + BATCH] * log_q).sum(-1))
    return torch.cat(found), torch.cat(expected) if expected else torch.empty(0)


def at(model: Elastic, widths: Widths) -> Callable[[int], None]:
    """What sets a model to these widths for every batch."""
    return lambda _: model.set_widths(widths)


def run(model: Elastic, ids: Tensor, rungs: Rungs, chosen: Tensor) -> Tensor:
    """Loss [n, T - 1] of tokens that take these rungs, [n, T]: a mixed choice, really run."""

    def set_to(start: int) -> None:
        model.set_policy(rungs.policy(chosen[start : start + BATCH], model), model.elastic.full(), "all")

    found, _ = token_losses(model, ids, set_to)
    model.turn(Dial.of(model.elastic.full()))
    return found


@torch.no_grad()
def losses(study: Study) -> None:
    """Every token's loss at every rung, and what could be known of it before."""
    model, rungs = study.model, study.rungs
    middle = int((rungs.static - 0.6).abs().argmin())
    for name, ids in zip(("judged", "other"), study.tokens, strict=True):
        if study.has(f"losses-{name}.safetensors"):
            continue
        by_rung: dict[str, list[list[Tensor]]] = {
            "label": [[] for _ in rungs.widths],
            "expected": [[] for _ in rungs.widths],
        }
        hidden, entropy = [], []
        for start in range(0, len(ids), BATCH):
            batch = ids[start : start + BATCH]
            model.set_widths(model.elastic.full())
            p = model(input_ids=batch, use_cache=False).logits[:, :-1].float().softmax(-1)
            for r, widths in enumerate(rungs.widths):
                label, expected = token_losses(model, batch, at(model, widths), p)
                by_rung["label"][r].append(label)
                by_rung["expected"][r].append(expected)
            model.set_widths(rungs.widths[middle])
            states = model.base_model(input_ids=batch, use_cache=False)[0]
            log_q = model.lm_head(states)[:, :-1].float().log_softmax(-1)
            hidden.append(states[:, :-1])
            entropy.append(-(log_q.exp() * log_q).sum(-1))
            study.progress(f"losses of {name} text", start + len(batch), len(ids))
        found = {  # [n, T - 1, R]
            f"{name}.{what}": torch.stack([torch.cat(parts) for parts in lists], -1)
            for what, lists in by_rung.items()
        }
        found[f"{name}.hidden"], found[f"{name}.entropy"] = torch.cat(hidden), torch.cat(entropy)
        found[f"{name}.embedding"] = model.get_input_embeddings()(ids[:, :-1])
        save_file({k: v.contiguous() for k, v in found.items()}, study.out / f"losses-{name}.safetensors")
    model.turn(Dial.of(model.elastic.full()))


# ---- choices


def choose(scores: Tensor, costs: Tensor, limit: float) -> Tensor:
    """The choices [...] of least score within a mean cost, by a Lagrange multiplier: argmin of score + m * cost.

    Exact but for the last choice that the limit would have to divide.

    Args:
        scores: [..., R], the loss of each choice, or a guess of it.
        costs: [R] or [..., R].
        limit: on the mean of the costs.
    """
    costs = costs.expand_as(scores)

    def at(multiplier: float) -> Tensor:
        return (scores + multiplier * costs).argmin(-1)

    def cost(chosen: Tensor) -> float:
        return float(costs.gather(-1, chosen[..., None]).mean())

    low, high = 0.0, 1e-3
    if cost(at(low)) <= limit:
        return at(low)
    while cost(at(high)) > limit:
        low, high = high, 2 * high
        if high > 1e9:
            raise ValueError(
                f"choose: limit must be at least {float(costs.min(-1).values.mean()):.3f}, got {limit}"
            )
    for _ in range(60):
        half = (low + high) / 2
        low, high = (half, high) if cost(at(half)) > limit else (low, half)
    return at(high)


def grouped(scores: Tensor, size: int) -> Tensor:
    """Scores [n, T, R], of which so many tokens in a row have the mean of theirs."""
    parts = [part.mean(1, keepdim=True).expand_as(part) for part in scores.split(size, 1)]
    return torch.cat(parts, 1)


def shuffled(chosen: Tensor) -> Tensor:
    """The same choices, given to tokens at random."""
    order = torch.randperm(chosen.numel(), generator=seeded("oracle/shuffled"))
    return chosen.flatten()[order].view_as(chosen)


def features(found: dict[str, Tensor], name: str, what: str, ids: Tensor) -> Tensor:
    """What a choice could look at, [n, T - 1, features].

    Args:
        what: ``"token"``: its embedding alone, which a prompt has before the first layer. ``"entropy"``: that of the
            prediction before, and how unlikely the token was by it. ``"state"``: all these, and the last state of the
            token before, which decoding has. ``"own state"``: the token's own last state and entropy at 0.6 of the
            cost, which nobody has before choosing: what the text allows to be told at all.
    """
    hidden, entropy = found[f"{name}.hidden"].float(), found[f"{name}.entropy"][..., None]
    middle = found[f"{name}.middle"]
    before = functional.pad(entropy, (0, 0, 1, 0))[:, :-1]
    unlikely = functional.pad(middle, (1, 0))[:, :-1, None]
    both = torch.cat([before, unlikely, before * unlikely, before.square()], -1)
    if what == "entropy":
        return both
    if what == "token":
        return found[f"{name}.embedding"]
    if what == "state":
        last = functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return torch.cat([both, found[f"{name}.embedding"] * 10, last], -1)
    return torch.cat([hidden, entropy, entropy.square(), both], -1)


def linear(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression of y [N, R] on x [N, features], both standardised."""
    mean, spread, centre = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    z = ((x - mean) / spread).double()
    left = z.T @ z + RIDGE * len(z) * torch.eye(z.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(left, z.T @ (y - centre).double()).float()
    return lambda new: (new - mean) / spread @ weight + centre


def network(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The same by a network with one hidden layer, stopped where every fifth row, which it does not learn, says so."""
    mean, spread, centre = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    z, target = (x - mean) / spread, y - centre
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(z.shape[1], 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, y.shape[1]))
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)
        kept = torch.arange(len(z)) // LENGTH % 5 != 0
        best, state = float("inf"), {k: v.clone() for k, v in net.state_dict().items()}
        for _ in range(30):
            for rows in torch.randperm(int(kept.sum())).split(256):
                optimiser.zero_grad()
                functional.mse_loss(net(z[kept][rows]), target[kept][rows]).backward()
                optimiser.step()
            net.eval()
            with torch.no_grad():
                error = float(functional.mse_loss(net(z[~kept]), target[~kept]))
            net.train()
            if error < best:
                best, state = error, {k: v.clone() for k, v in net.state_dict().items()}
        net.load_state_dict(state)
    net.eval().requires_grad_(False)
    return lambda new: net((new - mean) / spread) + centre


@dataclass(frozen=True)
class Static:
    """The best static budgets: the lower convex hull of the ladder's rungs, between which budgets can be mixed.

    Attributes:
        costs: [R].
        losses: [R, n], the mean loss of each sequence.
    """

    costs: Tensor
    losses: Tensor

    def at(self, cost: float) -> Tensor:
        """The loss of each sequence at a mean cost, [n]."""
        means = self.losses.mean(1)
        best: tuple[float, Tensor] | None = None
        for i in range(len(self.costs)):
            for j in range(i, len(self.costs)):
                a, b = float(self.costs[i]), float(self.costs[j])
                if not a - 1e-9 <= cost <= b + 1e-9:
                    continue
                share = 0.0 if i == j else (cost - a) / (b - a)
                loss = float(means[i] + share * (means[j] - means[i]))
                if best is None or loss < best[0]:
                    best = loss, torch.lerp(self.losses[i], self.losses[j], share)
        if best is None:
            raise ValueError(f"oracle: cost must lie within the ladder's, got {cost:.3f}")
        return best[1]


def row_of(arm: str, budget: float, loss: Tensor, paid: float, free: float, static: Static) -> dict[str, Any]:
    """One line of the results; loss [n, tokens].

    ``paid`` is the mean cost with keys and values of all groups for every token, ``free`` the same as if no token had
    to store more than it uses. ``gain`` is what the best static budget loses more at the cost that is paid, in nats,
    with its standard error over sequences; ``free_gain`` at the cost that is not.
    """
    own = loss.mean(1)

    def gain(cost: float) -> tuple[float, float]:
        more = static.at(min(cost, 1.0)) - own
        return float(more.mean()), float(more.std() / len(more) ** 0.5)

    (by_paid, error), (by_free, _) = gain(paid), gain(free)
    return {
        "arm": arm,
        "budget": budget,
        "paid": paid,
        "free": free,
        "loss": float(own.mean()),
        "gain": by_paid,
        "error": error,
        "free_gain": by_free,
    }


def choices(study: Study) -> None:
    """Choose by what each arm knows, run the mixed choices, and compare with the ladder at equal cost."""
    model, rungs, (ids, other) = study.model, study.rungs, study.tokens
    found: dict[str, Tensor] = {}
    middle = int((rungs.static - 0.6).abs().argmin())
    for name in ("judged", "other"):
        found |= load_file(study.out / f"losses-{name}.safetensors")
        found[f"{name}.middle"] = found[f"{name}.label"][..., middle]
    label = found["judged.label"]
    static = Static(rungs.static, label.mean(1).T)
    target = found["other.label"]
    target = (target - target.mean(-1, keepdim=True)).flatten(
        0, 1
    )  # what differs between rungs is all that matters

    def probe(fit: Callable[..., Callable[[Tensor], Tensor]], what: str) -> Tensor:
        guess = fit(features(found, "other", what, other).flatten(0, 1), target)
        return guess(features(found, "judged", what, ids))

    scores: dict[str, Callable[[], Tensor]] = {
        "oracle": lambda: label,
        "oracle of the full model's prediction": lambda: found["judged.expected"],
        "oracle, block of 64": lambda: grouped(label, BLOCK),
        "oracle, sequence": lambda: grouped(label, LENGTH),
        "linear probe, token": lambda: probe(linear, "token"),
        "linear probe, entropy": lambda: probe(linear, "entropy"),
        "linear probe, state": lambda: probe(linear, "state"),
        "linear probe, own state": lambda: probe(linear, "own state"),
        "network probe, state": lambda: probe(network, "state"),
    }
    path = study.out / "chosen.json"
    rows: Rows = read_json(path)["rows"] if path.is_file() else []
    done = {row["arm"] for row in rows}
    if "static" not in done:
        rows += [
            row_of("static", float(c), loss[:, None], float(c), float(c), static)
            for c, loss in zip(rungs.static, static.losses, strict=True)
        ]
    for count, (name, scored) in enumerate(scores.items()):
        if name in done:
            continue
        known = scored()
        for budget in BUDGETS:
            arms = {name: choose(known, rungs.paid, budget)}
            if name == "oracle":
                arms["oracle, not run"] = arms["oracle"]
                arms["oracle, shuffled"] = shuffled(arms["oracle"])
            for arm, chosen in arms.items():
                if arm == "oracle, not run":
                    loss = label.gather(-1, chosen[..., None])[..., 0]
                else:
                    loss = run(model, ids, rungs, functional.pad(chosen, (0, 1)))
                cost = float(rungs.paid[chosen].mean()), float(rungs.static[chosen].mean())
                rows.append(row_of(arm, budget, loss, *cost, static))
        write_json(path, {"rows": rows})
        study.progress("running choices", count + 1, len(scores))
    if study.has("adaptive/adaptive.json") and "adaptive router" not in done:
        write_json(path, {"rows": rows + _of_router(study, static)})


def _of_router(study: Study, static: Static) -> Rows:
    """The library's adaptive router, at its budgets."""
    model, (ids, _), (alike, choosing) = study.model, study.tokens, study.tables
    model.attach_router(AdaptiveResult.load(study.out / "adaptive").router)
    rows = []
    for budget in BUDGETS:
        model.turn(Dial.adaptive(model.elastic, [budget]))
        with model.watched() as forwards:
            loss, _ = token_losses(model, ids, lambda _: None)
        seen = Indices(*(torch.cat(axis)[:, :-1] for axis in zip(*forwards, strict=True)))
        cost = [float(table.of_tokens(seen) / table.full_ms) for table in (choosing, alike)]
        rows.append(row_of("adaptive router", budget, loss, cost[0], cost[1], static))
    model.turn(Dial.of(model.elastic.full()))
    return rows


def decode(study: Study) -> None:
    """The same where the first half of each sequence is a prompt that runs at full width, and the rest chooses."""
    if study.has("decoded.json"):
        return
    model, rungs, (ids, _) = study.model, study.rungs, study.tokens
    half, full = LENGTH // 2, len(rungs.widths) - 1

    def after(chosen: Tensor) -> Tensor:
        """Loss of the second half, whose tokens take these rungs, [n, half - 1]."""
        whole = torch.cat([torch.full((len(ids), half), full), functional.pad(chosen, (0, 1))], 1)
        return run(model, ids, rungs, whole)[:, half:]

    by_rung = []
    for r in range(len(rungs.widths)):
        by_rung.append(after(torch.full((len(ids), half - 1), r)))
        study.progress("rungs after a prompt", r + 1, len(rungs.widths))
    label = torch.stack(by_rung, -1)
    static = Static(rungs.static, label.mean(1).T)
    rows: Rows = []
    for budget in BUDGETS:
        chosen = choose(label, rungs.paid, budget)
        for arm, own in (("decode: oracle", chosen), ("decode: shuffled", shuffled(chosen))):
            cost = float(rungs.paid[own].mean()), float(rungs.static[own].mean())
            rows.append(row_of(arm, budget, after(own), *cost, static))
    write_json(study.out / "decoded.json", {"rows": rows})


# ---- a choice for every token and layer


def layers(study: Study) -> None:
    """From a static rung, each token of a sample moves one layer's choice at a time, with all else as it is.

    Every eighth token moves at once, and only its own loss counts. Then all moves that pay at one multiplier are taken
    together, and the whole is run: one round of a coordinate search that treats layers as if they added up.
    """
    model, (ids, _), rungs = study.model, study.tokens, study.rungs
    sample = ids[:: max(1, len(ids) // SAMPLED)][:SAMPLED]
    label_of_rungs, _ = zip(*(token_losses(model, sample, at(model, w)) for w in rungs.widths), strict=True)
    static = Static(rungs.static, torch.stack([loss.mean(1) for loss in label_of_rungs]))
    for budget in (0.65,):
        name = f"layers-{budget:g}.json"
        if study.has(name):
            continue
        start = rungs.choices
        r = int((rungs.static - budget).abs().argmin())
        base = Indices(*(axis[r].expand(sample.numel(), -1).contiguous() for axis in start))
        moved = {axis: moves(study, sample, base, axis) for axis in Indices._fields}
        write_json(study.out / name, {"rows": _taken(study, sample, base, moved, static, budget)})


@torch.no_grad()
def moves(study: Study, sample: Tensor, base: Indices, axis: str) -> Tensor:
    """The loss that each token has when one layer's choice of an axis is another one, [n, T - 1, L, C]."""
    model = study.model
    menu = getattr(model.elastic.choices, axis)
    n, T = sample.shape
    L = model.elastic.num_layers
    found = torch.zeros(n, T - 1, L, menu)
    done = 0
    for first in range(STRIDE):
        places = torch.arange(first, T - 1, STRIDE)
        rows = (torch.arange(n)[:, None] * T + places).flatten()
        for layer in range(L):
            for choice in range(menu):
                other = getattr(base, axis).clone()
                other[rows, layer] = choice
                chosen = base._replace(**{axis: other})
                found[:, places, layer, choice] = _own_losses(model, sample, chosen, places)
                done += 1
                study.progress(f"moves of {axis}", done, STRIDE * L * menu)
    return found


def _own_losses(model: Elastic, sample: Tensor, chosen: Indices, places: Tensor) -> Tensor:
    """Losses at some places [n, places], of tokens that have these choices, [n * T, L] of each axis."""
    found, T = [], sample.shape[1]
    for start in range(0, len(sample), BATCH):
        batch = sample[start : start + BATCH]
        rows = slice(start * T, (start + len(batch)) * T)
        policy = Given(Indices(*(axis[rows] for axis in chosen)), menus_of(model.elastic, model.device))
        model.set_policy(policy, model.elastic.full(), "all")
        states = model.base_model(input_ids=batch, use_cache=False)[0][:, places]
        log_q = model.lm_head(states).float().log_softmax(-1)
        found.append(-log_q.gather(-1, batch[:, places + 1, None])[..., 0])
    return torch.cat(found)


def _taken(
    study: Study, sample: Tensor, base: Indices, moved: dict[str, Tensor], static: Static, budget: float
) -> Rows:
    """Take the moves that pay, of one axis or of both, at the base's own cost; run them, and shuffled."""
    model, (alike, choosing) = study.model, study.tables
    n, T = sample.shape
    L = model.elastic.num_layers
    every = torch.arange(T - 1)
    rows: Rows = []

    def record(arm: str, chosen: Indices) -> None:
        seen = Indices(*(axis.view(n, T, L)[:, :-1] for axis in chosen))
        paid, free = (float(table.of_tokens(seen) / table.full_ms) for table in (choosing, alike))
        loss = _own_losses(model, sample, chosen, every)
        rows.append(row_of(arm, budget, loss, paid, free, static))

    record("layers: base", base)
    for axes in (("mlp",), ("heads",), ("mlp", "heads")):
        # all choices of a token as one list: a padded menu for each layer and axis
        widest = max(moved[axis].shape[-1] for axis in axes)

        def padded(x: Tensor, value: float, widest: int = widest) -> Tensor:
            return functional.pad(x, (0, widest - x.shape[-1]), value=value)

        costs = [torch.tensor(getattr(choosing, axis)) / choosing.full_ms for axis in axes]  # [L, C]
        scores = torch.cat([padded(moved[axis], 1e6) for axis in axes], 2)  # [n, T - 1, axes * L, C]
        each = torch.cat([padded(c, 1e6) for c in costs]).expand_as(scores)
        at_base = torch.cat([getattr(base, axis).view(n, T, L)[:, :-1] for axis in axes], -1)
        limit = float(each.gather(-1, at_base[..., None]).mean())
        best = choose(scores, each, limit).split(L, -1)
        chosen = base._replace(
            **{
                axis: torch.cat([own, getattr(base, axis).view(n, T, L)[:, -1:]], 1).reshape(-1, L)
                for axis, own in zip(axes, best, strict=True)
            }
        )
        record(f"layers: {' and '.join(axes)}", chosen)
        order = torch.randperm(n * T, generator=seeded("oracle/layers"))
        record(f"layers: {' and '.join(axes)}, shuffled", Indices(*(axis[order] for axis in chosen)))
    model.turn(Dial.of(model.elastic.full()))
    return rows


# ---- what came out


def rows_in(out: Path) -> Rows:
    names = ("chosen.json", "decoded.json", *(path.name for path in sorted(out.glob("layers-*.json"))))
    return [row for name in names if (out / name).is_file() for row in read_json(out / name)["rows"]]


def show(study: Study) -> None:
    """Print every row: gains are what the best static budget loses more at equal cost."""
    cells = [
        [
            r["arm"],
            f"{r['budget']:.2f}",
            f"{r['paid']:.3f}",
            f"{r['free']:.3f}",
            f"{r['loss']:.3f}",
            f"{r['gain']:+.3f}",
            f"{r['error']:.3f}",
            f"{r['gain'] / (r['loss'] + r['gain']):+.1%}",
            f"{r['free_gain']:+.3f}",
        ]
        for r in rows_in(study.out)
    ]
    header = [
        "chosen by",
        "budget",
        "cost",
        "cost without K/V",
        "loss",
        "gain",
        "error",
        "gain %",
        "gain without K/V",
    ]
    ui.print_table(f"{study.parent}: {study.judged} sequences of {LENGTH} tokens", header, cells)


def draw(study: Study) -> None:
    """Loss against mean cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_in(study.out)
    shown: Sequence[tuple[str, str, str]] = (
        ("static", "static ladder", "#222222"),
        ("adaptive router", "adaptive router", "#d95f02"),
        ("oracle, shuffled", "oracle, shuffled", "#999999"),
        ("linear probe, state", "linear probe", "#1f6fb4"),
        ("oracle of the full model's prediction", "oracle, without the next token", "#7a4fb4"),
        ("oracle", "oracle", "#2a9d4a"),
    )
    fig, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    for arm, label, colour in shown:
        points = sorted((r["paid"], r["loss"]) for r in rows if r["arm"] == arm)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=4)
    axes.set_xlabel("mean cost of a token: multiplications in the layers, of the full model's")
    axes.set_ylabel("held-out loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    fig.savefig(study.out / "oracle.png", dpi=100)


STAGES: dict[str, Callable[[Study], None]] = {
    "train": train,
    "route": route,
    "adaptive": adaptive,
    "losses": losses,
    "choose": choices,
    "decode": decode,
    "layers": layers,
    "print": show,
    "draw": draw,
}

if __name__ == "__main__":
    main()
