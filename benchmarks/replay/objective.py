"""When a load counts as sustained, and when a replay need not go on because it cannot be."""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.9


@dataclass(slots=True)
class Objective:
    """SHARE of so many requests have their first token within `ttft_s`."""

    ttft_s: float
    requests: int
    late: int = 0

    def first_token(self, ttft_s: float) -> None:
        self.late += ttft_s > self.ttft_s

    @property
    def missed(self) -> bool:
        """Whether nothing that can still come would do."""
        return self.requests - self.late < SHARE * self.requests
