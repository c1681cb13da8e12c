"""The types of option values: each reads a word of the command line, or says in our words what it must be."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """A type: whole numbers from ``least`` on."""

    def read(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is None or number < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, got {value or 'nothing'}"
            )
        return number

    return read


count = at_least(1)


def device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {value}")
    return value


def whole(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {value}") from None


def real(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a number, got {value}")
    return number


def seconds(value: str) -> float:
    number = real(value)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds of at least 0, got {value}")
    return number


def names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(","))


def wholes(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas between, got {value or 'nothing'}"
        ) from None


def counts(value: str) -> tuple[int, ...]:
    return tuple(count(part) for part in value.split(","))


def reals(value: str) -> tuple[float, ...]:
    try:
        return tuple(real(part) for part in value.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be numbers with commas between, got {value or 'nothing'}"
        ) from None
