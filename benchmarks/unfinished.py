"""A long benchmark that was interrupted goes on: finished units are lines of a file, and are not run again.

A unit is whatever identifies a piece of the work: its names and settings. Other settings are
another unit, so a file never lends its results to a different run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Unit = Mapping[str, Any]
Result = dict[str, Any]


def continue_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--continue",
        dest="unfinished",
        type=Path,
        metavar="FILE",
        help="add what is finished to this file, and skip what is in it",
    )


class Unfinished:
    """The finished units of one run, in memory and, where there is a file, on disk."""

    def __init__(self, path: Path | None) -> None:
        """A last line that was cut short by a kill is dropped. Raises ValueError for a file that is no such list."""
        self._path = path
        self._finished: dict[str, Result] = {}
        if path is None or not path.exists():
            return
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._finished[_key(entry["unit"])] = entry["result"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: wanted a finished unit, found {line:.60}") from error
        if whole != text:
            path.write_text(whole)

    def once(self, unit: Unit, work: Callable[[], Result]) -> Result:
        """The unit's result, from `work` unless it is finished already. What `work` raises leaves it unfinished."""
        key = _key(unit)
        if key not in self._finished:
            result = work()
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps({"unit": dict(unit), "result": result}) + "\n")
            self._finished[key] = result
        return self._finished[key]


def _key(unit: Unit) -> str:
    return json.dumps(unit, sort_keys=True)
