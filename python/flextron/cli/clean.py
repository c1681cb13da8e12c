"""Remove what only resuming needs: the optimiser states of finished runs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli.printing import say

EXAMPLE = "flextron clean elastic/ --dry-run"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", help="elastic checkpoint to clean; its weights, tables and routers stay")
    add("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    add(
        "--unfinished",
        action="store_true",
        help="remove the states of stopped runs too, which can then not be resumed",
    )


def run(args: Namespace) -> dict[str, Any]:
    from flextron import pipeline

    found = pipeline.clean(args.directory, unfinished=args.unfinished, dry_run=args.dry_run)
    total = sum(found.values())
    for path, size in found.items():
        say(args, f"{path}: {size} bytes")
    say(
        args,
        f"{args.directory}: {'would free' if args.dry_run else 'freed'} {total} bytes in {len(found)} files",
    )
    return {"files": found, "bytes": total, "dry_run": args.dry_run}
