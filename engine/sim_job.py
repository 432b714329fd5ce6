"""What goes into a simulated worker, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transfer.wire import Role

Part = Literal["whole", "prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """One worker's size and speed. The defaults that SGLang has too are SGLang's.

    capacity_tokens         KV slots; what does not fill a page is not used
    prefill_overhead_s      of an iteration in which a request begins
    prefill_tokens_per_s    at the start of a prompt
    context_halving_tokens  a token after so many others takes twice as long
    chunk_tokens            prefilled in one iteration, at most; a multiple of page_tokens
    decode_step_s           of one token for every running request, to which come
    decode_request_s        for each of them, and
    decode_context_s        for each KV token of theirs
    handoff_bytes_per_s     from prefill to decode, for one request
    page_bytes              of one page's KV

    new_token_ratio         share of its longest answer that a running request is expected to need still;
                            shrinks to min_new_token_ratio over new_token_ratio_steps decode steps
    max_new_tokens_reserved longest answer that is reserved for
    retract_steps           decode steps that there must be room for after a retraction
    decode_reserved_tokens  that a decode worker keeps for each request it has
    decode_radix_cache      whether a decode worker keeps a prefix cache
    """

    role: Role = "both"
    capacity_tokens: int
    page_tokens: int
    prefill_overhead_s: float = 0.02
    prefill_tokens_per_s: float
    context_halving_tokens: float = 54_000
    chunk_tokens: int = 8192
    max_running_requests: int = 256
    decode_step_s: float = 0.02
    decode_request_s: float = 0.0
    decode_context_s: float = 0.0
    handoff_bytes_per_s: float = float("inf")
    page_bytes: int = 0
    new_token_ratio: float = 0.7
    min_new_token_ratio: float = 0.098
    new_token_ratio_steps: int = 600
    max_new_tokens_reserved: int = 4096
    retract_steps: int = 20
    decode_reserved_tokens: int = 512
    decode_radix_cache: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.chunk_tokens < self.page_tokens or self.chunk_tokens % self.page_tokens:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} is no multiple of page_tokens={self.page_tokens}")
        if self.capacity_tokens < 4 * self.page_tokens:
            raise ValueError(f"capacity_tokens={self.capacity_tokens} is less than four pages")
        if self.decode_step_s + self.decode_request_s <= 0 or self.prefill_tokens_per_s <= 0:
            raise ValueError("a token has to take some time")

    @property
    def pages(self) -> int:
        return self.capacity_tokens // self.page_tokens


@dataclass(frozen=True, slots=True)
class SimJob:
    """A request, or its prefill or decode part.

    ids                chain ids of the prompt's whole pages
    output_tokens      that the model answers, at least one
    output_ids         chain ids of the whole pages of prompt and answer; empty: pages that the answer
                       fills are not kept
    max_new_tokens     that the client allows, and so what is reserved; 0: `output_tokens`
    decode_held_pages  of a prefill part: leading pages that decode has, and that are not handed over
    """

    rid: int
    ids: Sequence[int]
    prompt_tokens: int
    output_tokens: int
    output_ids: Sequence[int] = ()
    part: Part = "whole"
    max_new_tokens: int = 0
    decode_held_pages: int = 0


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt is computed. cached_tokens: of them that were not, being in the cache already."""

    rid: int
    at_s: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Allocated:
    """Decode has room for the prompt: its prefill part may be submitted now. held_pages need not be handed over."""

    rid: int
    at_s: float
    held_pages: int


@dataclass(frozen=True, slots=True)
class FirstToken:
    rid: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Retracted:
    """The pool was full; the request lost its pages and waits again. It ends later all the same."""

    rid: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The last token is out; of a prefill part: the KV is handed over."""

    rid: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The request can never fit."""

    rid: int
    at_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Aborted:
    rid: int
    at_s: float
    reason: str


SimEvent = Prefilled | Allocated | FirstToken | Retracted | Finished | Refused | Aborted
Ended = Finished | Refused | Aborted
"""The last event of a request; each has one."""
