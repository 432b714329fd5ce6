"""What is finished is not run again; what was cut short is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.unfinished import Unfinished


class Counted:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, Any]:
        self.times += 1
        return {"value": self.times}


def test_a_finished_unit_is_not_run_again_by_a_later_run(tmp_path: Path) -> None:
    work = Counted()
    first = Unfinished(tmp_path / "units").once({"round": 0, "way": "shm"}, work)
    later = Unfinished(tmp_path / "units")

    assert later.once({"way": "shm", "round": 0}, work) == first == {"value": 1}
    assert later.once({"way": "shm", "round": 1}, work) == {"value": 2}
    assert work.times == 2


def test_a_line_that_was_cut_short_is_run_again_and_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "units"
    work = Counted()
    run = Unfinished(path)
    run.once({"round": 0}, work)
    run.once({"round": 1}, work)
    path.write_text(path.read_text()[:-5])

    again = Unfinished(path)
    assert again.once({"round": 0}, work) == {"value": 1}
    assert again.once({"round": 1}, work) == {"value": 3}
    assert Unfinished(path).once({"round": 1}, work) == {"value": 3}


def test_work_that_fails_leaves_its_unit_unfinished(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise OSError("no")

    run = Unfinished(tmp_path / "units")
    with pytest.raises(OSError, match="no"):
        run.once({"round": 0}, fails)

    assert run.once({"round": 0}, Counted()) == {"value": 1}


def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("my notes\nand more")
    with pytest.raises(ValueError, match="line 1: wanted a finished unit, found my notes"):
        Unfinished(path)
    assert path.read_text() == "my notes\nand more"


def test_without_a_file_everything_is_run() -> None:
    assert Unfinished(None).once({"round": 0}, Counted()) == {"value": 1}
