"""Requests go where their prefix is, and the engine itself says that it was there."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.client import Answer, chat, complete, get_json
from benchmarks.legs import Pair, direct
from benchmarks.words import sentence
from engine.launch.cluster import Cluster

PREFIX_WORDS = 1050
"""As many tokens of SmolLM2."""
LONG_WORDS = 1900
"""Nearly all that it takes. A worker that computes them is the wrong one even if it is believed to be twice as fast."""
BUSY_WORDS = 3 * 512 + 10
"""Three passes and a little of a fourth, in which there is room for others."""
SHARED_WORDS = 300
"""Less than there is room for, and more than is computed twice (engine.siblings)."""
EVENT_TRAVEL_S = 0.5


def asked(cluster: Cluster, prompt: str) -> Answer:
    answer = complete(cluster.url, cluster.plan.router.model, prompt, 2)
    assert answer.error == "", answer
    time.sleep(EVENT_TRAVEL_S)
    return answer


def page_floor(cluster: Cluster, tokens: int) -> int:
    page = cluster.plan.workers[0].page_tokens
    return tokens // page * page


def test_a_shared_prefix_goes_to_the_same_worker_and_the_engine_reports_it_cached(live: Cluster) -> None:
    prefix = sentence(101, PREFIX_WORDS)

    first = asked(live, f"{prefix} one question")
    second = asked(live, f"{prefix} another question")

    assert first.prompt_tokens > 1000
    assert (first.matched_tokens, first.cached_tokens) == (0, 0)
    assert second.prefill == first.prefill
    assert second.cached_tokens == second.matched_tokens >= page_floor(live, first.prompt_tokens - 16)


def test_another_prefix_goes_to_the_other_worker(live: Cluster) -> None:
    """While the first one is computed: which of two idle workers is the better one is learned, from noise mostly."""
    with ThreadPoolExecutor() as clients:
        running = clients.submit(asked, live, sentence(102, LONG_WORDS))
        while not any(worker["outstanding_uncached_tokens"] for worker in get_json(live.url, "/api/state")["workers"]):
            assert not running.done(), "it was to be computed while the other one is sent"
            time.sleep(0.02)
        other = asked(live, sentence(103, PREFIX_WORDS))
        first = running.result()

    newest = get_json(live.url, "/api/state")["requests"][0]
    why = get_json(live.url, f"/api/explain/{newest['id']}")["decision"]
    assert {first.prefill, other.prefill} == {"prefill-0", "prefill-1"}, why


def test_requests_that_begin_alike_and_wait_together_have_their_beginning_computed_once(live: Cluster) -> None:
    """At one prefill worker, without a router that might send one of them elsewhere: both would fit into one pass."""
    model, system = live.plan.router.model, sentence(107, SHARED_WORDS)
    prefill, decode = (next(one for one in live.plan.workers if one.role == role) for role in ("prefill", "decode"))
    pair = Pair.of(prefill, decode)
    with ThreadPoolExecutor() as clients:
        running = []
        for prompt in (sentence(108, BUSY_WORDS), f"{system} one question", f"{system} another question"):
            running.append(clients.submit(direct, pair, model, prompt, 2))
            time.sleep(EVENT_TRAVEL_S)
        answers = [one.result() for one in running]

    assert not any(answer.error for answer in answers), answers
    _, first, second = answers
    assert first.cached_tokens == 0, answers
    assert second.cached_tokens >= page_floor(live, first.prompt_tokens - 16), answers


def test_a_prompt_seen_before_is_cached_but_for_its_last_page(live: Cluster) -> None:
    prompt = sentence(104, 120)
    first = asked(live, prompt)
    again = asked(live, prompt)

    assert again.cached_tokens == again.matched_tokens == page_floor(live, first.prompt_tokens - 1)


def test_tenants_with_different_salts_share_nothing(live: Cluster) -> None:
    messages = [{"role": "user", "content": sentence(105, 100)}]
    model = live.plan.router.model

    def salted(salt: str) -> Answer:
        answer = chat(live.url, model, messages, 2, cache_salt=salt)
        assert answer.error == "", answer
        time.sleep(EVENT_TRAVEL_S)
        return answer

    salted("red")
    blue, red_again = salted("blue"), salted("red")

    assert (blue.matched_tokens, blue.cached_tokens) == (0, 0)
    assert red_again.cached_tokens == red_again.matched_tokens > 0


def test_what_the_dashboard_shows_is_what_happened(live: Cluster) -> None:
    prompt = sentence(106, 200)
    asked(live, prompt)
    answer = asked(live, prompt)

    state = get_json(live.url, "/api/state")
    request = state["requests"][0]
    worker = next(one for one in state["workers"] if one["name"] == answer.prefill)

    assert request["id"] == answer.headers["x-request-id"]
    assert (request["prefill"], request["decode"]) == (answer.prefill, answer.decode)
    assert request["predicted_cached_tokens"] == request["actual_cached_tokens"] == answer.cached_tokens
    assert worker["mode"] == "exact"
    assert worker["held_pages"] > 0
    explained = get_json(live.url, f"/api/explain/{request['id']}")
    assert {one["prefill"] for one in explained["decision"]["candidates"]} == {"prefill-0", "prefill-1"}
