"""The table of docs/families.md, made by conversions of tiny random models: python tests/families_page.py --update

Without --update it compares what does not depend on the machine.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import made_page
import torch
from nn.models import EVERY, row_model

from flextron.config import Widths
from flextron.conversion import convert
from flextron.nn import elastic_config
from flextron.nn.anatomy import anatomy_of
from flextron.nn.plain import padded_problem, stock_problem

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
MARK = "<!-- Everything below is made by: python tests/families_page.py --update -->\n"
HEADER = ("family", "full = parent", "sub-networks = plain", "inference on a CPU", "window", "export")


def described(row: str) -> tuple[str, str, str]:
    """The last cells of a row: what does not depend on the machine."""
    hf = row_model(row).config
    config, anatomy = elastic_config(hf), anatomy_of(hf)
    fault = anatomy.decoder_fault(hf)
    windowed = any(anatomy.window(hf, i) is not None for i in range(config.num_layers))
    mlp, heads = config.mlp_choices, config.head_choices
    mixed = Widths(
        (mlp[0], *(mlp[-1],) * (config.num_layers - 1)), (heads[0], *(heads[-1],) * (config.num_layers - 1))
    )
    layouts = [
        "uniform" if stock_problem(config, config.smallest()) is None else "uniform, all heads",
        *([] if padded_problem(config, mixed) else ["padded"]),
        "ragged",
    ]
    return (
        "decoder op" if fault is None else f"modules: {fault}",
        "yes" if windowed else "",
        ", ".join(layouts),
    )


def proven(row: str) -> tuple[str, str]:
    """The first cells: what a conversion proves."""
    tokens = torch.randint(3, 61, (4, 24), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        parity = convert(row_model(row), Path(folder) / "elastic", calibration=tokens)["parity"]
    widest = max(found["max_rel"] for found in parity["sub_networks"])
    return f"{parity['max_rel']:.0e}", f"{widest:.0e}"


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |\n"


def made() -> str:
    rows = [line((f"`{row}`", *proven(row), *described(row))) for row in EVERY]
    return line(HEADER) + line(("---",) * len(HEADER)) + "".join(rows)


def faults() -> list[str]:
    """The families whose row says something else than the code does."""
    page = PAGE.read_text(encoding="utf-8").partition(MARK)[2]
    rows = {text.split("|")[1].strip(): text for text in page.splitlines() if text.startswith("| `")}
    wrong = [
        row for row in EVERY if not rows.get(f"`{row}`", "").endswith(line(described(row))[1:].rstrip("\n"))
    ]
    return wrong + [name for name in rows if name.strip("`") not in EVERY]


if __name__ == "__main__":
    if sys.argv[1:] == ["--update"]:
        sys.exit(made_page.run(PAGE, MARK, made(), "what conversions prove"))
    print("\n".join(faults()), end="")
    sys.exit(bool(faults()))
