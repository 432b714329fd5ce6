"""What is read from answers as they pass."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.answer import StreamWatch, Usage, whole


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


USAGE = {"prompt_tokens": 40, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 32}}
STREAM = [
    event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}),
    chunk('"error": {"finish_reason": "abort"'),
    chunk("two"),
    event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}),
    event({"choices": [], "usage": USAGE}),
    b"data: [DONE]\n\n",
]


@given(st.lists(st.integers(0, sum(map(len, STREAM))), max_size=8))
def test_a_stream_is_understood_however_it_is_cut(cuts: list[int]) -> None:
    stream, watch = b"".join(STREAM), StreamWatch()
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(stream)], strict=True):
        watch.feed(stream[start:end])
    seen = watch.end()

    assert seen.failure is None  # text that looks like an error is none
    assert seen.finish_reason == "length"
    assert seen.token_events == 2
    assert seen.usage == Usage(40, 2, 32)
    assert not seen.empty


def test_an_error_in_a_stream_is_found_with_its_status() -> None:
    watch = StreamWatch()
    watch.feed(chunk("one") + event({"error": {"object": "error", "message": "out of memory", "code": 503}}))

    failure = watch.end().failure

    assert failure is not None
    assert (failure.status, failure.message, failure.told) == (503, "out of memory", True)


def test_an_aborted_stream_is_a_failure_that_the_client_was_not_told_of() -> None:
    watch = StreamWatch()
    watch.feed(chunk("one") + chunk("", "abort"))

    failure = watch.end().failure

    assert failure is not None
    assert not failure.told


def test_a_stream_without_a_token_or_a_reason_is_empty() -> None:
    watch = StreamWatch()
    watch.feed(STREAM[0] + b"data: [DONE]\n\n")

    assert watch.end().empty


def test_a_whole_answer_is_read() -> None:
    answer = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": USAGE}

    seen = whole(json.dumps(answer).encode())

    assert seen.usage == Usage(40, 2, 32)
    assert seen.finish_reason == "stop"
    assert seen.failure is None


def test_no_cached_tokens_are_none() -> None:
    seen = whole(b'{"usage": {"prompt_tokens": 4, "completion_tokens": 1, "prompt_tokens_details": null}}')

    assert seen.usage == Usage(4, 1, 0)


def test_a_whole_answer_that_is_an_error_or_nothing_is_no_success() -> None:
    flat = whole(b'{"object": "error", "message": "no", "code": 400}').failure

    assert flat is not None
    assert flat.status == 400
    assert whole(b"").empty
    assert whole(b'{"choices": []}').empty
    assert whole(b'{"choices": [{"finish_reason": "abort"}]}').failure is not None
