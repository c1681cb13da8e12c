"""Train routers on the latency table: static ones, or with --adaptive one that chooses for every token."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values
from flextron.cli.printing import warn
from flextron.recipes import AdaptiveConfig, RouteConfig

EXAMPLE = "flextron route elastic/"


def options(parser: ArgumentParser) -> None:
    parser.add_argument("directory", help="elastic checkpoint to train routers for; it must be profiled")
    shared.data(parser)
    shared.phase(parser, "phase whose latency the targets mean")
    shared.workload(parser)
    shared.machine(parser)
    fields = ("targets", "form", "evaluations", "prefill", "steps", "gates", "seed")
    shared.from_two(parser, RouteConfig, AdaptiveConfig, fields)
    parser.add_argument(
        "--samples",
        type=values.count,
        help="number of sequences that losses are measured on (default: 4; with --adaptive 64, to train and judge on)",
    )
    parser.add_argument("--length", type=values.count, default=128, help="tokens in each of these sequences")
    parser.add_argument(
        "--adaptive",
        action="store_true",
        help="train the router that chooses for every token, from where the static routers are",
    )
    shared.accept_noise(parser)
    shared.placed(parser)


def run(args: Namespace) -> dict[str, Any]:
    return _adaptive(args) if args.adaptive else _static(args)


def _static(args: Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui

    if args.gates:
        raise ValueError("route: --gates must be given with --adaptive only")
    if args.prefill is not None and args.form == "steps":
        raise ValueError("route: --prefill must not be given with --form steps, which begins with steps")
    config = shared.taken(RouteConfig, args)
    table = shared.given(args, "batch", "context", "machine")
    with ui.reporter() as progress:
        result = pipeline.route(args.directory, config, **table, **_text(args), progress=progress)
    if not args.json:
        header = ["target", "routed", "uniform", "searched (surrogate)"]
        rows = [
            [
                f"{t.target:.2f}",
                f"{t.routed_observed:+.3f}",
                f"{t.uniform_observed:+.3f}",
                f"{t.search_loss:+.3f}",
            ]
            for t in result.targets
        ]
        ui.print_table(f"{result.measure}, nats", header, rows)
        _say_fit(result.surrogate, result.gate)
    return result.to_dict()


def _adaptive(args: Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui

    if args.evaluations is not None:
        raise ValueError(
            "route: --evaluations must not be given with --adaptive, which asks for one in each step"
        )
    if args.prefill is not None and args.form != "surrogate":
        raise ValueError("route: --prefill must be given with --adaptive only for --form surrogate")
    for name in ("batch", "context", "machine"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"route: --{name} must not be given with --adaptive, which is calibrated for each phase's smallest "
                "workload on this machine"
            )
    config = shared.taken(AdaptiveConfig, args)
    with ui.reporter() as progress:
        result = pipeline.route_adaptive(args.directory, config, **_text(args), progress=progress)
    if not args.json:
        header = ["target", "of full (table)", "loss", "static of full", "static loss"]
        rows = [
            [
                f"{t.target:.2f}",
                f"{t.fraction:.3f}",
                f"{t.loss:.3f}",
                f"{t.static_fraction:.3f}",
                f"{t.static_loss:.3f}",
            ]
            for t in result.targets
        ]
        ui.print_table(f"sequences not trained on; full model {result.full_loss:.3f} nats", header, rows)
        _say_fit(result.surrogate, result.gate)
    return result.to_dict()


def _text(args: Namespace) -> dict[str, Any]:
    return {
        "data": shared.text_of(args),
        "doubted": shared.doubted(args),
        **shared.given(args, "phase", "samples", "length", "dtype", "device"),
    }


def _say_fit(fit: Any, gate: Any) -> None:
    """How far to trust the surrogate, where there was one."""
    if fit is None:
        return
    print(
        f"surrogate on {fit.n} held-out configurations: R² {fit.r2:.3f}, rank {fit.rank:.3f}, worst error "
        f"{fit.worst_error:.3f} nats at {fit.worst_fraction:.2f}"
    )
    if not gate.passed:
        warn(
            f"{gate.steps_above} router steps were taken with the surrogate's error at or above {gate.threshold} nats"
        )
