"""From a request to a plan: its tokens, what each worker holds of them, and the pair that gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.decision import Decision
from router.fleet import Fleet, Worker
from router.index import Index
from router.messages import Unrenderable
from router.openai import ClientRequest, Endpoint, check_length
from router.placement import Placement
from router.policy import NoWorker
from router.render import Renderer
from transfer.pages import chain_ids, namespace, root_id

BYTES_A_TOKEN = 4
"""Guess for the load of a prompt whose tokens are not known."""
MAX_GUESS_TOKENS = 8192
"""No guess is larger: most of a long body that is not tokenized is images, and its worker would be avoided in vain."""


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
    pages: Sequence[int]
    """Chain ids of the prompt's whole pages, by which it was chosen; none where it was not tokenized."""
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
    return Prompt(None, min(MAX_GUESS_TOKENS, max(1, len(request.raw) // BYTES_A_TOKEN)), reason)


class Planner:
    """Finds what the workers hold of a prompt, and lets the placement choose."""

    def __init__(self, fleet: Fleet, index: Index, placement: Placement) -> None:
        self._fleet = fleet
        self._index = index
        self._placement = placement

    def plan(self, request: ClientRequest, prompt: Prompt, now_s: float) -> Plan:
        """Chooses the pair. Raises policy.NoWorker, ApiError where the prompt is too long for it."""
        try:
            decision, pages = self._choose(self._fleet.candidates(now_s), request, prompt, now_s)
        except NoWorker:
            decision, pages = self._choose(self._fleet.ready(), request, prompt, now_s)
        chosen = Plan(decision, pages, self._fleet[decision.prefill], self._fleet[decision.decode])
        if prompt.ids is not None:
            both = (chosen.prefill.registration, chosen.decode.registration)
            check_length(request, prompt.tokens, min(registration.max_context_tokens for registration in both))
        return chosen

    def _choose(
        self, workers: tuple[list[Worker], list[Worker]], request: ClientRequest, prompt: Prompt, now_s: float
    ) -> tuple[Decision, Sequence[int]]:
        """The decision, and the prompt's chain ids."""
        prefills, decodes = workers
        pages, held = self._held(request.salt, prompt, [*prefills, *decodes])
        decision = self._placement.choose(
            prefills,
            decodes,
            held,
            pages,
            prompt.tokens,
            prefills[0].registration.page_tokens if prefills else 1,
            request.session,
            now_s,
            guessed=prompt.ids is None,
        )
        return decision, pages

    def _held(self, salt: str, prompt: Prompt, workers: Sequence[Worker]) -> tuple[list[int], dict[str, int]]:
        """The prompt's chain ids, and how many leading ones each worker holds. All workers of a cluster name alike."""
        if prompt.ids is None or not workers:
            return [], {}
        registration = workers[0].registration
        root = root_id(namespace(registration.model, registration.revision, salt))
        pages = chain_ids(root, prompt.ids, registration.page_tokens)
        return pages, self._index.match(pages)
