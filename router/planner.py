"""From a request to a plan: its tokens, what each worker holds of them, and the pair that gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.config import RouterSection
from router.fleet import FeedMode, Fleet, Worker
from router.index import Index
from router.messages import Unrenderable
from router.openai import ClientRequest, Endpoint, check_length
from router.policy import Decision, DecodeView, PrefillView, choose
from router.render import Renderer
from transfer.pages import chain_ids, namespace, root_id

BYTES_A_TOKEN = 4
"""Guess for the load of a prompt whose tokens are not known."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is known of a prompt. Without ids, the number of tokens is a guess."""

    ids: list[int] | None
    tokens: int
    unrendered: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a request goes. The workers are those of this moment: an epoch that ends takes its requests along."""

    decision: Decision
    prefill: Worker
    decode: Worker

    @property
    def alone(self) -> bool:
        """One worker does both parts."""
        return self.prefill is self.decode


def render(renderer: Renderer, request: ClientRequest) -> Prompt:
    """The prompt's tokens, or why they are not known."""
    try:
        rendered = (
            renderer.chat(request.body) if request.endpoint is Endpoint.CHAT else renderer.completion(request.body)
        )
    except Unrenderable as error:
        reason = str(error)
    except RecursionError:
        reason = "nested too deeply"
    else:
        return Prompt(rendered.ids, len(rendered.ids))
    return Prompt(None, max(1, len(request.raw) // BYTES_A_TOKEN), reason)


def plan(
    request: ClientRequest,
    prompt: Prompt,
    *,
    fleet: Fleet,
    index: Index,
    section: RouterSection,
    now_s: float,
    number: int,
) -> Plan:
    """Chooses the pair. Raises policy.NoWorker, ApiError where the prompt is too long for it."""
    prefills = fleet.candidates(("prefill", "both"), now_s)
    decodes = fleet.candidates(("decode", "both"), now_s)
    held = _held(request.salt, prompt, [*prefills, *decodes], index)
    decision = choose(
        [_prefill_view(worker, held, now_s) for worker in prefills],
        [_decode_view(worker, held) for worker in decodes],
        prompt_tokens=prompt.tokens,
        page_tokens=prefills[0].registration.page_tokens if prefills else 1,
        cost=section.cost,
        seed=section.seed,
        number=number,
    )
    chosen = Plan(decision, fleet[decision.prefill], fleet[decision.decode])
    if prompt.ids is not None:
        both = (chosen.prefill.registration, chosen.decode.registration)
        check_length(request, prompt.tokens, min(registration.max_context_tokens for registration in both))
    return chosen


def _held(salt: str, prompt: Prompt, workers: Sequence[Worker], index: Index) -> dict[str, int]:
    """Leading pages of the prompt that each of these workers holds."""
    if prompt.ids is None:
        return {}
    held: dict[str, int] = {}
    for model, revision, page_tokens in {_identity(worker) for worker in workers}:
        ids = chain_ids(root_id(namespace(model, revision, salt)), prompt.ids, page_tokens)
        held |= index.match(ids)
    return held


def _identity(worker: Worker) -> tuple[str, str, int]:
    return worker.registration.model, worker.registration.revision, worker.registration.page_tokens


def _prefill_view(worker: Worker, held: dict[str, int], now_s: float) -> PrefillView:
    return PrefillView(
        name=worker.name,
        held_pages=held.get(worker.name, 0),
        exact=worker.mode is FeedMode.EXACT,
        outstanding_tokens=worker.outstanding_uncached_tokens,
        outstanding_requests=worker.outstanding_prefills,
        recent_tokens=worker.recent.at(now_s),
        alone=worker.role == "both",
    )


def _decode_view(worker: Worker, held: dict[str, int]) -> DecodeView:
    return DecodeView(
        name=worker.name,
        held_pages=held.get(worker.name, 0),
        running_requests=worker.running_requests,
        inflight_tokens=worker.inflight_tokens,
        alone=worker.role == "both",
    )
