"""Say what an elastic checkpoint, or a folder of tokens, holds, every file of it verified; or what this machine is."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from flextron.cli import options as shared

if TYPE_CHECKING:  # the help of a command needs neither
    from flextron.artefacts.latency_table import LatencyTable
    from flextron.artefacts.static_router import RouterResult

EXAMPLE = "flextron info elastic/"


def options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "directory",
        nargs="?",
        help="elastic checkpoint: a directory or a hub id; or a folder that `flextron tokenize` has written",
    )
    parser.add_argument(
        "--machine",
        action="store_true",
        help="say what this machine's processor is, in place of a directory: its instruction set, threads and caches, "
        "what it reads from memory, and which GEMM multiplies plain weights, measured where it was not yet",
    )


def run(args: Namespace) -> dict[str, Any]:
    from flextron import ui
    from flextron.tokens.folder import is_token_folder

    if args.machine == bool(args.directory):
        raise ValueError(
            f"info: either a directory or --machine must be given, got {'both' if args.machine else 'neither'}"
        )
    if args.machine:
        title, facts = "this machine", _of_machine()
    else:
        title = shared.fetched(args)
        facts = _of_tokens(title) if is_token_folder(title) else _facts(title)
    if not args.json:
        ui.print_table(title, ["what", "value"], [[name, shown(value)] for name, value in facts.items()])
    return facts


def _of_machine() -> dict[str, Any]:
    from flextron.artefacts.machine import caches
    from flextron.judge.timing import read_bandwidth
    from flextron_ext import machine

    facts = machine()
    return {
        "processor": facts["processor"],
        "instruction set": f"{facts['isa']}: {facts['why']}",
        "threads": facts["threads"],
        "caches": caches(),
        "reads": f"{read_bandwidth() / 1e9:.1f} GB/s",
        "GEMMs of plain weights": {
            dtype: {_rows(gemm["most"]): _gemm(gemm) for gemm in facts["gemms"] if gemm["dtype"] == dtype}
            for dtype in dict.fromkeys(gemm["dtype"] for gemm in facts["gemms"])
        },
        "measured": facts["files"],
    }


def _rows(most: int | None) -> str:
    return f"up to {most} rows:" if most else "more rows:"


def _gemm(gemm: dict[str, Any]) -> str:
    """Which is chosen, and what both took."""
    if gemm["own"] is None:
        return f"{gemm['chosen']}, not measured"
    return f"{gemm['chosen']}, as ours took {gemm['own'] * 1e6:.0f} us, the vendor's {gemm['vendor'] * 1e6:.0f} us"


def _facts(directory: str) -> dict[str, Any]:
    from flextron.artefacts.directory import ElasticDirectory
    from flextron.artefacts.latency_files import machines, of_machine
    from flextron.nn.storage import common, counted, name_of

    with ElasticDirectory.open(directory) as checkpoint:
        model, meta, tables = checkpoint.model(), checkpoint.meta, checkpoint.tables
        routers, adaptive = checkpoint.static(), checkpoint.adaptive()
    config = model.elastic
    return {
        "family": config.family,
        **({"like": config.like} if config.like else {}),
        "layers": config.num_layers,
        "mlp choices": list(config.mlp_choices),
        f"head choices ({config.unit})": list(config.head_choices),
        "parameters, full": config.params(config.full()),
        "parameters, smallest": config.params(config.smallest()),
        "stored in": counted(model.stored),
        "stock transformers loads": name_of(common(model.stored.values())),
        **_parity(meta),
        "latency tables": {name: _latencies(of_machine(tables, name)) for name in machines(tables)},
        "routers": f"trained for {_target(routers, tables)}" if routers else "none",
        "adaptive router": f"trained for {adaptive.phase}" if adaptive else "none",
    }


def _of_tokens(directory: str) -> dict[str, Any]:
    from flextron import ui
    from flextron.tokens.folder import TokenFolder

    folder = TokenFolder(directory)
    with ui.reporter() as reporter:
        folder.verify(partial(reporter, "verifying files"))
    d = folder.description
    return {
        "tokens": len(folder.train) + len(folder.held_out),
        "tokens, held out": len(folder.held_out),
        "documents": d.documents,
        "characters": d.characters,
        "files": len(d.train) + len(d.held_out),
        "stored in": d.dtype,
        "tokenizer": f"{d.tokenizer.vocabulary} tokens",
        "sources": [str(source.get("path")) for source in d.sources],
    }


def _latencies(tables: Sequence[LatencyTable]) -> dict[str, str]:
    """The range of each workload of one machine."""
    return {str(t.workload): f"{t.smallest_ms:.4g} .. {t.full_ms:.4g} ms{_doubtful(t)}" for t in tables}


def _doubtful(table: LatencyTable) -> str:
    return f", may be wrong by {table.error:.0%}" if table.doubt else ""


def _target(routers: RouterResult, tables: Sequence[LatencyTable]) -> str:
    """What routers were trained for, as far as the table is still there."""
    from flextron.artefacts.static_router import trained_on

    table = trained_on(tables, routers.phase, routers.costs)
    return routers.phase if table is None else f"{table.workload} on {table.machine_name}"


def _parity(meta: dict[str, Any]) -> dict[str, Any]:
    """What the certificate says, and about which weights."""
    from flextron.checkpoint.origin import weights_of

    parity = meta.get("parity", {})
    now = parity.get("weights") == weights_of(meta["checksums"])
    return {
        "parity": parity.get("max_rel"),
        "parity is of": "these weights" if now else "the weights before they were trained or saved again",
        "parity, rounding alone": (parity.get("rounding") or {}).get("max_rel"),
        "parity of sub-networks": [proven["max_rel"] for proven in parity.get("sub_networks") or ()],
    }


def shown(value: Any) -> str:
    """A fact as a reader wants it: {"float32": 272} is 272 × float32, and a figure of a proof has two digits."""
    if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
        return "\n".join(f"{name}:\n{_lines(inner)}" for name, inner in value.items())
    if isinstance(value, dict):
        parts = [f"{n} × {name}" if isinstance(n, int) else f"{name} {n}" for name, n in value.items()]
        return ", ".join(parts) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    if value is None:
        return "not known"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _lines(facts: dict[str, Any]) -> str:
    return "\n".join(f"{name} {value}" for name, value in facts.items())
