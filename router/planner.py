"""From a request to a plan: its tokens, what each worker holds of them, and the pair that gets it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from router.avoid import Avoid
from router.decision import Decision
from router.fleet import Fleet, Worker
from router.index import Index
from router.messages import Unrenderable
from router.openai import ClientRequest, Endpoint, check_length
from router.placement import Placement, slots
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
    request: ClientRequest
    prompt: Prompt

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


class NoRoom(NoWorker):
    """There are workers, and none of them has room now."""


class Planner:
    """Finds what the workers hold of a prompt, and lets the placement choose.

    reserve_tokens   room for so many tokens of an answer, or as many as it may have, is wanted before it begins
    backlog_s        a prefill worker that has so much to compute, and more than one prompt, gets nothing more
    aggregate        whether workers that do both stand in where there are others, and none of them can prefill
    """

    def __init__(
        self,
        fleet: Fleet,
        index: Index,
        placement: Placement,
        *,
        reserve_tokens: int = 512,
        backlog_s: float = math.inf,
        aggregate: bool = True,
    ) -> None:
        self._fleet = fleet
        self._index = index
        self._placement = placement
        self._reserve_tokens = reserve_tokens
        self._backlog_s = backlog_s
        self._aggregate = aggregate

    @property
    def _has_roles(self) -> bool:
        """Whether there are workers that prefill for others, or decode for them, at least at times."""
        return any(worker.role != "both" for worker in self._fleet)

    @property
    def token_s(self) -> float:
        """What a worker takes for one more token of a prompt, about."""
        return self._placement.model.prefill_s("", 1024, 1024) / 1024

    def new_tokens(self, request: ClientRequest) -> int:
        """Tokens of an answer for which decode shall have room before it begins."""
        return min(request.max_new_tokens or self._reserve_tokens, self._reserve_tokens)

    def plan(
        self, request: ClientRequest, prompt: Prompt, now_s: float, avoid: Avoid, *, only_with_room: bool = True
    ) -> Plan:
        """Chooses the pair. Raises policy.NoWorker, ApiError where the prompt is too long for every worker.

        only_with_room  False: also where the request has to wait in an engine's own queue
        """
        try:
            return self._among(self._fleet.candidates(), request, prompt, now_s, avoid, only_with_room)
        except NoRoom:
            raise
        except NoWorker:
            return self._among(self._fleet.ready(), request, prompt, now_s, avoid, only_with_room)

    def _among(
        self,
        workers: tuple[list[Worker], list[Worker]],
        request: ClientRequest,
        prompt: Prompt,
        now_s: float,
        avoid: Avoid,
        only_with_room: bool,
    ) -> Plan:
        prefills, decodes = ([worker for worker in some if worker not in avoid.workers] for some in workers)
        if not (self._aggregate or any(worker.role == "prefill" for worker in prefills)) and self._has_roles:
            prefills = []
        if prompt.ids is not None and prefills and decodes:
            longest = min(max(one.registration.max_context_tokens for one in some) for some in (prefills, decodes))
            check_length(request, prompt.tokens, longest)
            prefills, decodes = ([one for one in some if _fits(request, prompt, one)] for some in (prefills, decodes))
        pages, held = self._held(request.salt, prompt, [*prefills, *decodes])
        if only_with_room and prefills and decodes:
            prefills = self._without_backlog(prefills, now_s)
            decodes = self._with_room(decodes, request, prompt, held)
        for some, others in _allowed(prefills, decodes, avoid):
            with suppress(NoWorker):
                plan = self._chosen(some, others, request, prompt, pages, held, now_s)
                if (plan.prefill, plan.decode) not in avoid.pairs:
                    return plan
        raise NoWorker(f"no pair of workers is ready: {len(prefills)} can prefill, {len(decodes)} can decode")

    def _without_backlog(self, prefills: list[Worker], now_s: float) -> list[Worker]:
        """Those that will come to one more prompt soon. Raises NoRoom."""
        soon = [one for one in prefills if one.outstanding_prefills < 2 or one.wait_s(now_s) <= self._backlog_s]
        if not soon:
            raise NoRoom(f"every prefill worker has more than {self._backlog_s:g} s to compute")
        return soon

    def _with_room(
        self, decodes: list[Worker], request: ClientRequest, prompt: Prompt, held: dict[str, int]
    ) -> list[Worker]:
        """Those that can take the whole prompt now. Raises NoRoom."""
        new_tokens = self.new_tokens(request)
        roomy = [
            worker
            for worker in decodes
            if worker.has_room(
                slots(prompt.tokens, held.get(worker.name, 0), worker.registration.page_tokens, new_tokens)
            )
        ]
        if not roomy:
            raise NoRoom(f"no decode worker has room for {prompt.tokens} tokens")
        return roomy

    def _chosen(
        self,
        prefills: list[Worker],
        decodes: list[Worker],
        request: ClientRequest,
        prompt: Prompt,
        pages: Sequence[int],
        held: dict[str, int],
        now_s: float,
    ) -> Plan:
        """What the policy chooses. Raises policy.NoWorker."""
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
        return Plan(decision, pages, self._fleet[decision.prefill], self._fleet[decision.decode], request, prompt)

    def _held(self, salt: str, prompt: Prompt, workers: Sequence[Worker]) -> tuple[list[int], dict[str, int]]:
        """The prompt's chain ids, and how many leading ones each worker holds. All workers of a cluster name alike."""
        if prompt.ids is None or not workers:
            return [], {}
        registration = workers[0].registration
        root = root_id(namespace(registration.model, registration.revision, salt))
        pages = chain_ids(root, prompt.ids, registration.page_tokens)
        return pages, self._index.match(pages)


def _fits(request: ClientRequest, prompt: Prompt, worker: Worker) -> bool:
    return prompt.tokens + (request.max_new_tokens or 1) <= worker.registration.max_context_tokens


def _allowed(
    prefills: list[Worker], decodes: list[Worker], avoid: Avoid
) -> Iterator[tuple[list[Worker], list[Worker]]]:
    """Among whom to choose, the best first: of a pair that failed, it is not known which of the two is to blame."""
    if avoid.pairs:
        near = [one for one in prefills if all(one is not prefill for prefill, _ in avoid.pairs)]
        far = [one for one in decodes if all(one is not decode for _, decode in avoid.pairs)]
        yield near, far
        yield near, decodes
        yield prefills, far
        for decode in decodes:
            yield [one for one in prefills if (one, decode) not in avoid.pairs], [decode]
    else:
        yield prefills, decodes
