"""What is read from answers that come in one piece."""

from __future__ import annotations

import json

from router.answer import Usage, whole

USAGE = {"prompt_tokens": 40, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 32}}


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
