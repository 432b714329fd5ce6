"""How long an attempt may stay in each of its phases, and what it means when it stays longer."""

from __future__ import annotations

from collections.abc import Callable

from router.faults import Fault, LegFailed
from router.lifecycle import Phase


class Patience:
    """Of one attempt. Limits are seconds from its start; None where there is none.

    request_at_s   when the request's own time is over, by `clock_s`
    delivered_s    until the pages are delivered
    first_byte_s   until decode's first token, of a stream
    whole_s        until a whole answer has come, from when its pages were delivered; where no
                   time is set for that, from the start
    """

    def __init__(
        self,
        clock_s: Callable[[], float],
        *,
        request_at_s: float,
        delivered_s: float | None,
        first_byte_s: float | None,
        whole_s: float | None = None,
    ) -> None:
        self._clock_s = clock_s
        self._request_at_s = request_at_s
        self._started_s = clock_s()
        self._delivered_s = delivered_s
        self._first_byte_s = first_byte_s
        self._whole_s = whole_s
        self._decoding_since_s: float | None = None if delivered_s is not None else self._started_s

    def delivered(self) -> None:
        """The pages are with decode, which is on its own from here on."""
        self._decoding_since_s = self._clock_s()

    @property
    def decoding_s(self) -> float:
        """For how long decode has had all that it needs; 0 before."""
        return 0.0 if self._decoding_since_s is None else self._clock_s() - self._decoding_since_s

    @property
    def expired(self) -> bool:
        """Whether the request's own time is over."""
        return self._clock_s() >= self._request_at_s

    def left_s(self, phase: Phase) -> float:
        """Until something has to happen. At least 0."""
        ends = [self._request_at_s]
        if phase is Phase.SENT and self._delivered_s is not None:
            ends.append(self._started_s + self._delivered_s)
        if phase in (Phase.SENT, Phase.DELIVERED) and self._first_byte_s is not None:
            ends.append(self._started_s + self._first_byte_s)
        if phase in (Phase.SENT, Phase.DELIVERED) and self._whole_s is not None and self._decoding_since_s is not None:
            ends.append(self._decoding_since_s + self._whole_s)
        return max(0.0, min(ends) - self._clock_s())

    def late(self, phase: Phase, prefill: str, decode: str) -> LegFailed:
        """What is to be said of an attempt that has stayed in this phase for too long."""
        waited_s = self._clock_s() - self._started_s
        if self._first_byte_s is not None and waited_s >= self._first_byte_s:
            message = f"{decode} sent nothing within {self._first_byte_s:g} s"
            return LegFailed(decode, Fault.TIMEOUT, message, 504)
        if self._whole_s is not None and self._decoding_since_s is not None:
            return LegFailed(decode, Fault.TIMEOUT, f"{decode} had no answer within {self._whole_s:.1f} s", 504)
        message = f"{prefill} handed nothing over to {decode} within {waited_s:.1f} s"
        return LegFailed(prefill, Fault.HANDOFF, message, 504)
