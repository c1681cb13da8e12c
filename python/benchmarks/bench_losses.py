"""What packed weights lose beside llama.cpp's types: python bench_losses.py elastic/ --judge TEXT --fit TEXT

Nats per token of the same text and the same networks: plain, packed in every format, and int4 calibrated (int4+fit);
llama.cpp runs them as GGUF files, if xllamacpp is installed. MB: of ours the layers and the head at full width, else of
the file. A row that is in --out does not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from llama_cpp_rival import LlamaCpp
from torch import Tensor

import flextron
from flextron.checkpoint.hf import read_tokenizer
from flextron.checkpoint.io import read_lines
from flextron.config import Widths
from flextron.data import encode, windows
from flextron.documents import read_documents
from flextron.exporting import export_gguf

PLAIN, FITTED = "plain", "int4+fit"
FORMATS = (PLAIN, "int8", "w8a8", "int4", FITTED)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("directory", help="elastic checkpoint")
    parser.add_argument("--judge", required=True, help="text whose first tokens are judged")
    parser.add_argument("--fit", help=f"text of which windows calibrate {FITTED}")
    parser.add_argument(
        "--samples", type=int, default=16, help="sequences that are judged, and that calibrate"
    )
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--formats", type=names, default=list(FORMATS))
    parser.add_argument("--types", type=names, default=["q8_0", "q4_k", "q4_0"], help="of GGUF files")
    parser.add_argument(
        "--neurons", type=lambda text: [int(n) for n in names(text)], help="of the menu; the most by default"
    )
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--out", type=Path, help="JSON lines of the rows")
    return parser.parse_args(arguments)


def loss_of(logits: Tensor, ids: Tensor) -> float:
    """The sum of the nats of tokens [n, length] but the first, of logits [n, length, V]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()


def ours(model: Any, ids: Tensor) -> float:
    return sum(loss_of(model(rows, use_cache=False).logits, rows) for rows in ids.split(4))


def of_llama_cpp(path: Path, ids: Tensor) -> float:
    rival = LlamaCpp(path, torch.get_num_threads(), ids.shape[1] + 64)
    total = 0.0
    for row in ids:
        rival.reset()
        total += loss_of(torch.from_numpy(rival.logits(row.tolist()))[None], row[None])
    rival.close()
    return total


def rows(args: argparse.Namespace, done: set[tuple[str, int]]) -> Any:
    tokenizer = read_tokenizer(args.directory)
    ids = encode(read_documents(args.judge), tokenizer, args.samples * args.length).view(-1, args.length)

    def loaded() -> Any:
        return flextron.from_pretrained(args.directory, args.dtype, device="cpu")

    model = loaded()
    c = model.elastic
    counts = args.neurons or [c.mlp_choices[-1]]
    networks = {n: Widths((n,) * c.num_layers, (c.max_heads,) * c.num_layers) for n in counts}

    def row(who: str, n: int, nats: float, nbytes: int) -> dict[str, Any]:
        return {"who": who, "neurons": n, "loss": nats / ids[:, 1:].numel(), "bytes": nbytes}

    for format in args.formats:
        missing = [n for n in counts if (format, n) not in done]
        if not missing:
            continue
        packed, fit = loaded(), None
        if format == FITTED:
            if args.fit is None:
                raise ValueError(f"bench_losses: --fit must be given for {FITTED}, got no text")
            stream = encode(read_documents(args.fit), tokenizer, 64 * args.samples * args.length)
            fit = windows(stream, args.samples, args.length)
        name = {PLAIN: None, FITTED: "int4"}.get(format, format)
        size = flextron.pack(packed, name, calibration=fit).bytes_after
        for n in missing:
            packed.set_widths(networks[n])
            yield row(f"flextron, {format}", n, ours(packed, ids), size)
    if importlib.util.find_spec("xllamacpp") is None:
        print("bench_losses: xllamacpp is not installed, so there is no llama.cpp beside the others")
        return
    for kind in args.types:
        for n in (n for n in counts if (kind, n) not in done):
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / f"{kind}.gguf"
                report = export_gguf(model, path, networks[n], kind=kind)
                yield row(f"llama.cpp, {kind}", n, of_llama_cpp(path, ids), report["bytes"])


def show(found: list[dict[str, Any]]) -> None:
    base = {row["neurons"]: row["loss"] for row in found if row["who"] == f"flextron, {PLAIN}"}
    print(f"{'':24}{'neurons':>8}{'MB':>8}{'loss':>9}{'over plain':>12}")
    for row in sorted(found, key=lambda row: -row["neurons"]):
        over = f"{row['loss'] - base[row['neurons']]:+12.4f}" if row["neurons"] in base else ""
        print(f"{row['who']:24}{row['neurons']:8}{row['bytes'] / 1e6:8.1f}{row['loss']:9.4f}{over}")


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    args = parse()
    found = read_lines(args.out) if args.out and args.out.exists() else []
    done = {(row["who"].rpartition(", ")[2], row["neurons"]) for row in found}
    with torch.no_grad():
        for row in rows(args, done):
            found.append(row)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    show(found)


if __name__ == "__main__":
    main()
