"""The two ways a command ends badly, split by who has to act.

Both print as one line (BadInput: one line for each mistake), never as a traceback.
"""

from __future__ import annotations


class BadInput(Exception):
    """What the user wrote cannot be used: exit code 2. A line names the place, what was wanted and what was found."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class LaunchFailed(Exception):
    """The input was fine, yet it did not work: exit code 1."""

    exit_code = 1
