"""What passes of a stream, and when; what is known of it; and how another worker's part continues it."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.answer import Usage
from router.token_stream import Continuation, TokenStream


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(text: str, finish: str | None = None, rid: str = "r0") -> bytes:
    return event({"id": rid, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


def opening(rid: str = "r0") -> bytes:
    delta = {"role": "assistant", "content": ""}
    return event({"id": rid, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def finish(rid: str = "r0", reason: str = "length") -> bytes:
    return event({"id": rid, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})


def mark(*ids: int) -> bytes:
    return b"mainstem: " + ",".join(map(str, ids)).encode() + b"\n"


MORE = b"mainstem: +\n"
USAGE = {"prompt_tokens": 40, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 32}}
DONE = b"data: [DONE]\n\n"
STREAM = [
    opening(),
    mark(7) + chunk('"error": {"finish_reason": "abort"'),
    MORE + chunk("two"),
    finish(),
    event({"choices": [], "usage": USAGE}),
    DONE,
]
UNMARKED = b"".join(STREAM).replace(mark(7), b"").replace(MORE, b"")


@given(st.lists(st.integers(0, sum(map(len, STREAM))), max_size=8))
def test_a_stream_is_understood_and_passes_without_its_marks_however_it_is_cut(cuts: list[int]) -> None:
    raw, stream = b"".join(STREAM), TokenStream()
    passed = [
        stream.feed(raw[start:end]) for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(raw)], strict=True)
    ]

    assert b"".join(passed) + stream.end() == UNMARKED
    assert stream.seen.failure is None  # text that looks like an error is none
    assert stream.seen.finish_reason == "length"
    assert stream.seen.token_events == 2
    assert stream.seen.usage == Usage(40, 2, 32)
    assert stream.ids == [7]
    assert stream.exact
    assert stream.done


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3), st.booleans(), st.booleans()),
        max_size=12,
    ),
    st.integers(0, 5000),
)
def test_wherever_it_is_cut_off_the_text_that_passed_is_that_of_the_known_tokens(
    steps: list[tuple[list[int], bool, bool]], cut: int
) -> None:
    """Each token's text is its number: what has passed can be compared with the ids."""
    pending: list[int] = []
    raw = opening()
    unsaid = ""
    for ids, whole, silent in steps:
        unsaid += "".join(f"<{token}>" for token in ids)
        pending += ids
        if whole or not silent:
            raw += (mark(*pending) if whole else MORE) + chunk(unsaid)
            unsaid = ""
        else:
            # Of a character that is not whole its engine says nothing.
            raw += MORE + chunk("")
        pending = [] if whole else pending

    stream = TokenStream()
    passed = stream.feed(raw[:cut])

    said = "".join(
        json.loads(line[6:])["choices"][0]["delta"]["content"] for line in passed.decode().split("\n") if line
    )
    assert said == "".join(f"<{token}>" for token in stream.ids)


def test_nothing_passes_before_the_first_token() -> None:
    stream = TokenStream()

    assert stream.feed(opening()) == b""
    assert not stream.begun
    assert stream.feed(mark(1) + chunk("one")) == opening() + chunk("one")


def test_what_says_nothing_waits_for_nothing() -> None:
    """The first part of a character: whoever counts events would see two of them at once, and then none."""
    stream = TokenStream()
    first, nothing, last = mark(1) + chunk("one"), MORE + chunk(""), mark(2, 3) + chunk("é")

    assert stream.feed(MORE + chunk("")) == b""
    assert stream.feed(first) == chunk("") + chunk("one")
    assert stream.feed(nothing) == chunk("")
    assert stream.ids == [1]
    assert stream.feed(last) == chunk("é")
    assert stream.ids == [1, 2, 3]


def test_what_says_nothing_stays_behind_what_waits() -> None:
    stream = TokenStream()
    stream.feed(mark(1) + chunk("one"))

    assert stream.feed(MORE + chunk("t") + MORE + chunk("")) == b""
    assert stream.feed(mark(2) + chunk("wo")) == chunk("t") + chunk("") + chunk("wo")


def test_the_stream_of_an_engine_that_does_not_mark_passes_at_once_and_is_not_exact() -> None:
    stream = TokenStream()
    stream.feed(opening())

    assert stream.feed(chunk("one")) == opening() + chunk("one")
    assert not stream.exact


def test_lines_may_end_as_in_http() -> None:
    stream = TokenStream()

    assert stream.feed(chunk("one").replace(b"\n", b"\r\n")) == chunk("one")


def test_an_error_is_found_with_its_status_and_does_not_pass() -> None:
    stream = TokenStream()
    passed = stream.feed(
        mark(1) + chunk("one") + MORE + event({"error": {"object": "error", "message": "out of memory", "code": 503}})
    )

    assert passed + stream.end() == chunk("one")
    failure = stream.seen.failure
    assert failure is not None
    assert (failure.status, failure.message) == (503, "out of memory")


def test_an_abort_is_a_failure_and_does_not_pass() -> None:
    stream = TokenStream()

    assert stream.feed(mark(1) + chunk("one") + finish(reason="abort")) == chunk("one")
    assert stream.seen.failure is not None


def test_a_stream_without_a_token_or_a_reason_is_empty() -> None:
    stream = TokenStream()
    stream.feed(opening() + DONE)

    assert stream.seen.empty


def test_a_part_continues_the_stream_as_if_it_were_one() -> None:
    first, second = TokenStream(), TokenStream(Continuation(b"r0", b"r1", generated_tokens=2))
    begun = first.feed(opening() + mark(1) + chunk("one ") + mark(2) + chunk("two ") + MORE + chunk("th"))

    usage = {"prompt_tokens": 42, "completion_tokens": 3, "total_tokens": 45}
    rest = second.feed(
        opening("r1")
        + mark(3)
        + chunk("three ", rid="r1")
        + MORE
        + chunk("four", rid="r1")
        + finish("r1")
        + event({"id": "r1", "choices": [], "usage": usage})
        + DONE
    )

    whole = {"prompt_tokens": 40, "completion_tokens": 5, "total_tokens": 45}
    parsed = [json.loads(line[6:]) for line in (begun + rest).decode().split("\n") if line and "[DONE]" not in line]
    assert {one["id"] for one in parsed} == {"r0"}
    assert [one["choices"][0]["delta"].get("content") for one in parsed[:-1]] == [
        "", "one ", "two ", "three ", "four", None,
    ]  # fmt: skip
    assert parsed[-1]["usage"] == whole
    assert second.seen.usage == Usage(42, 3, 0)  # as its own worker counts
    assert rest.endswith(DONE)
