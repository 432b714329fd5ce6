"""Results as people read them, or as one JSON object on the last line."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine


def arguments(purpose: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line, and no table")
    return parser


def model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a known model's name or a checkpoint's folder, in place of the config's")


def progress(text: str) -> None:
    """One line for people who wait; never mixed with the result."""
    print(text, file=sys.stderr, flush=True)


def publish(result: dict[str, Any], columns: Sequence[str], rows: Sequence[Sequence[object]], as_json: bool) -> None:
    """Prints the result, and in either form what it ran on."""
    if as_json:
        print(json.dumps({**result, "machine": machine.describe()}))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console()
    console.print(table)
    console.print(machine.one_line(), style="dim")


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)
