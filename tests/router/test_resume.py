"""Which streams can go on elsewhere, and what is asked then."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.openai import ClientRequest, Endpoint, read
from router.resume import forbids, hinders, remaining, stop_strings
from router.token_stream import TokenStream


def request(endpoint: Endpoint = Endpoint.COMPLETIONS, *, may_resume: bool = True, **fields: Any) -> ClientRequest:
    body: dict[str, Any] = {"model": "m", "stream": True, **fields}
    if endpoint is Endpoint.COMPLETIONS:
        body.setdefault("prompt", "hi")
    else:
        body.setdefault("messages", [{"role": "user", "content": "hi"}])
    return read(endpoint, json.dumps(body).encode(), "m", may_resume=may_resume)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, ""),
        ({"stop": ["a"], "seed": 3, "temperature": 0.7, "logit_bias": {"1": 2}, "ignore_eos": True}, ""),
        ({"frequency_penalty": 0, "repetition_penalty": 1.0, "logprobs": None, "response_format": None}, ""),
        ({"stream": False}, "not a stream"),
        ({"may_resume": False}, "the client forbids it"),
        ({"prompt": ["a"]}, "a batch"),
        ({"prompt": [[1, 2], [3]]}, "a batch"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": False}, ""),
        ({"regex": "a+"}, "regex"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
    ],
)
def test_what_depends_on_more_than_the_context_stays_where_it_is(fields: dict[str, Any], why: str) -> None:
    assert forbids(request(**fields)) == why


@pytest.mark.parametrize(
    ("tail", "why"),
    [("and so on", ""), ("and then EN", "stop string begun"), ("and then E", "stop string begun"), ("END of", "")],
)
def test_a_stop_string_that_has_begun_would_be_missed(tail: str, why: str) -> None:
    assert hinders(TokenStream(), ["END", "\n\n"], tail) == why


def test_text_whose_tokens_are_not_known_or_that_was_told_apart_as_reasoning_stays() -> None:
    unknown, reasoned = TokenStream(), TokenStream()
    unknown.feed(b'data: {"choices": [{"text": "a"}]}\n\n')
    reasoned.feed(b'mainstem: 4\ndata: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\n\n')

    assert hinders(unknown, [], "") == "tokens unknown"
    assert hinders(reasoned, [], "") == "reasoning"


def test_what_is_left_is_asked_for_in_the_field_that_the_client_used() -> None:
    chat = request(Endpoint.CHAT, max_completion_tokens=10, max_tokens=99)

    assert remaining(request(max_tokens=10, min_tokens=5, echo=True), 4) == {
        "max_tokens": 6,
        "min_tokens": 1,
        "echo": False,
    }
    assert remaining(request(), 4) == {"max_tokens": 12}  # OpenAI's default of 16
    assert remaining(chat, 4) == {"max_completion_tokens": 6}
    assert remaining(request(Endpoint.CHAT), 4) == {}


def test_stop_strings_come_as_one_or_as_a_list() -> None:
    assert stop_strings(request(stop="x")) == ["x"]
    assert stop_strings(request(stop=["x", "y"])) == ["x", "y"]
    assert stop_strings(request()) == []
