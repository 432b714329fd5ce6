"""The two ways a command ends badly, split by who has to act.

Both print as one line (BadInput: one line for each mistake), never as a traceback.
"""

from __future__ import annotations

import sys


class BadInput(Exception):
    """What the user wrote cannot be used: exit code 2. A line names the place, what was wanted and what was found."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class LaunchFailed(Exception):
    """The input was fine, yet it did not work: exit code 1."""

    exit_code = 1

    @property
    def lines(self) -> tuple[str, ...]:
        return (str(self),)


def complain(program: str, *lines: str) -> None:
    """Says so on stderr, each line with the program's name."""
    for line in lines:
        print(f"{program}: {line}", file=sys.stderr, flush=True)
