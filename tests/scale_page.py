"""The second part of docs/scale.md, made from the model on paper: python tests/scale_page.py --update

Without --update it compares, and says whether the page is what `flextron scale` would print.
"""

from __future__ import annotations

import sys
from pathlib import Path

import made_page

from flextron.cli.scale import header, rows
from flextron.devices import DEVICES
from flextron.recipes import StepConfig
from flextron.scale.plans import Plan, first_that_fits
from flextron.scale.shapes import SHAPES, STORED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
MARK = "<!-- Everything below is made by: python tests/scale_page.py --update -->\n"
GPUS = (1, 8, 16, 64)
DEVICE = next(d for d in DEVICES if d.name == "h100")


def table(plans: list[Plan]) -> str:
    first, rest = header(plans), rows(plans)
    lines = [first, ["---", *["---:"] * len(plans)], *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def made() -> str:
    parts = []
    for name, shape in SHAPES.items():
        parts.append(f"## {name.upper()} on {DEVICE.name.upper()}\n")
        for teacher, title in (
            ("none", "Without a teacher:\n"),
            ("whole", "With a teacher (`--distillation 1`):\n"),
        ):
            step = StepConfig(teacher=teacher, teacher_value=STORED)
            plans = [first_that_fits(shape, step, ranks, DEVICE) for ranks in GPUS]
            parts += [title, table(plans)]
        typed = [p.command() for p in plans if p.fits]
        parts += ["With a teacher, type on every node:\n", "```bash", *typed, "```\n"] if typed else []
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(made_page.run(PAGE, MARK, made(), "what is computed"))
