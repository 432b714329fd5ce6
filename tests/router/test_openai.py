"""Reading a body, refusing it, and adding to it without touching it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.openai import MAX_BODY_BYTES, ApiError, Endpoint, Handoff, check_length, engine_rids, leg_body, read
from transfer.wire import parse_bound_host

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}
ROOM = Handoff(host="10.0.0.1", port=7000, room=2**62, epoch=1700)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def raw(body: Any) -> bytes:
    return json.dumps(body).encode()


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["user", "stop", "seed", "x y", "ü", '"']), values, max_size=4),
    st.sampled_from([b"", b"\n", b"  \r\n"]),
    st.booleans(),
)
def test_the_clients_bytes_are_kept_and_ours_win(extra: dict[str, Any], space: bytes, stream: bool) -> None:
    body = {**CHAT, **extra, "stream": stream}
    sent = space + json.dumps(body, ensure_ascii=False, indent=1).encode() + space
    request = read(Endpoint.CHAT, sent, "m")

    prefill = leg_body(request, "r" * 32, [1, 2], ROOM, keep_stream=False)
    decode = leg_body(request, "r" * 32, [1, 2], ROOM, keep_stream=True)

    assert prefill.startswith(sent.strip()[:-1])
    assert decode.startswith(sent.strip()[:-1])
    ours = {
        "input_ids": [1, 2],
        "rid": "r" * 32,
        "bootstrap_host": "1700@10.0.0.1",
        "bootstrap_port": 7000,
        "bootstrap_room": 2**62,
    }
    # Python's json is what the engine parses with: the last of equal keys is taken.
    assert json.loads(decode) == {**body, **ours}
    assert json.loads(prefill) == {**body, **ours, "stream": False}


@given(st.sampled_from(["10.0.0.1", "::1", "fe80::1%eth0", "node-3"]), st.integers(0, 2**63))
def test_the_engine_side_reads_back_the_life_that_a_request_is_bound_for(host: str, epoch: int) -> None:
    request = read(Endpoint.CHAT, raw(CHAT), "m")

    body = json.loads(leg_body(request, "r", [1], Handoff(host, 7000, 1, epoch), keep_stream=True))

    assert parse_bound_host(body["bootstrap_host"]) == (host, epoch)
    assert parse_bound_host(host) == (host, None)


def test_a_completions_prompt_becomes_its_ids() -> None:
    request = read(Endpoint.COMPLETIONS, raw(COMPLETION), "m")

    assert json.loads(leg_body(request, "r", [5], ROOM, keep_stream=True))["prompt"] == [5]


def test_a_body_that_was_not_rendered_keeps_its_prompt() -> None:
    body = {**COMPLETION, "prompt": ["a", "b"]}
    request = read(Endpoint.COMPLETIONS, raw(body), "m")

    added = json.loads(leg_body(request, "r", None, ROOM, keep_stream=True))

    assert added == {
        **body,
        "rid": "r",
        "bootstrap_host": "1700@10.0.0.1",
        "bootstrap_port": 7000,
        "bootstrap_room": 2**62,
    }


def test_a_worker_that_decodes_itself_gets_no_room() -> None:
    request = read(Endpoint.CHAT, raw(CHAT), "m")

    assert json.loads(leg_body(request, "r", [1], None, keep_stream=True)) == {**CHAT, "input_ids": [1], "rid": "r"}


def test_a_null_stream_is_none() -> None:
    request = read(Endpoint.CHAT, raw({**CHAT, "stream": None}), "m")

    assert request.stream is False
    assert json.loads(leg_body(request, "r", [1], ROOM, keep_stream=True))["stream"] is False


def test_salt_and_extra_key_are_joined_as_the_engine_does() -> None:
    assert read(Endpoint.CHAT, raw({**CHAT, "extra_key": "b", "cache_salt": "a"}), "m").salt == "ab"
    assert read(Endpoint.CHAT, raw({**CHAT, "extra_key": None, "cache_salt": ""}), "m").salt == ""


REFUSED: list[tuple[Endpoint, Any, int, str, str | None]] = [
    (Endpoint.CHAT, [1], 400, "body: wanted a JSON object, found a list", None),
    (Endpoint.CHAT, {}, 400, "model: wanted the name", "model"),
    (Endpoint.CHAT, {**CHAT, "model": 3}, 400, "model: wanted text, found a number", "model"),
    (Endpoint.CHAT, {**CHAT, "model": "n"}, 404, "model: wanted 'm', found 'n'", "model"),
    (Endpoint.CHAT, {"model": "m"}, 400, "messages: wanted a list of messages, found none", "messages"),
    (Endpoint.CHAT, {**CHAT, "messages": []}, 400, "messages: wanted at least one", "messages"),
    (Endpoint.CHAT, {**CHAT, "messages": "hi"}, 400, "messages: wanted a list, found text", "messages"),
    (Endpoint.CHAT, {**CHAT, "messages": ["hi"]}, 400, r"messages\[0\]: wanted an object, found text", "messages[0]"),
    (Endpoint.CHAT, {**CHAT, "stream": "yes"}, 400, "stream: wanted true or false, found text", "stream"),
    (Endpoint.CHAT, {**CHAT, "n": 2}, 400, "n: wanted 1", "n"),
    (Endpoint.CHAT, {**CHAT, "n": 0}, 400, "n: wanted at least 1, found 0", "n"),
    (Endpoint.CHAT, {**CHAT, "max_tokens": -1}, 400, "max_tokens: wanted at least 1, found -1", "max_tokens"),
    (Endpoint.CHAT, {**CHAT, "max_tokens": 1.5}, 400, "max_tokens: wanted a whole number", "max_tokens"),
    (Endpoint.CHAT, {**CHAT, "max_tokens": True}, 400, "max_tokens: wanted a whole number", "max_tokens"),
    (Endpoint.CHAT, {**CHAT, "input_ids": [1]}, 400, "input_ids: set by the router", "input_ids"),
    (Endpoint.CHAT, {**CHAT, "rid": "x"}, 400, "rid: set by the router", "rid"),
    (Endpoint.CHAT, {**CHAT, "bootstrap_room": 1}, 400, "bootstrap_room: set by the router", "bootstrap_room"),
    (Endpoint.CHAT, {**CHAT, "routed_dp_rank": 0}, 400, "routed_dp_rank: the router chooses", "routed_dp_rank"),
    (Endpoint.CHAT, {**CHAT, "cache_salt": 3}, 400, "cache_salt: wanted text", "cache_salt"),
    (Endpoint.CHAT, {**CHAT, "cache_salt": "a\0b"}, 400, "cache_salt: wanted text without NUL", "cache_salt"),
    (Endpoint.COMPLETIONS, {"model": "m"}, 400, "prompt: wanted text or token ids, found none", "prompt"),
    (Endpoint.COMPLETIONS, {**COMPLETION, "prompt": ""}, 400, "prompt: wanted at least one token", "prompt"),
    (
        Endpoint.COMPLETIONS,
        {**COMPLETION, "prompt": {}},
        400,
        "prompt: wanted text or a list, found an object",
        "prompt",
    ),
    (Endpoint.COMPLETIONS, {**COMPLETION, "prompt": [1, -1]}, 400, "prompt: wanted token ids", "prompt"),
    (Endpoint.COMPLETIONS, {**COMPLETION, "prompt": ["a", 1]}, 400, "prompt: wanted texts, or lists", "prompt"),
    (Endpoint.COMPLETIONS, {**COMPLETION, "prompt": ["a"] * 1025}, 400, "prompt: wanted at most 1024", "prompt"),
]


@pytest.mark.parametrize(("endpoint", "body", "status", "message", "param"), REFUSED)
def test_a_mistake_is_named_with_what_was_wanted_and_found(
    endpoint: Endpoint, body: Any, status: int, message: str, param: str | None
) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        read(endpoint, raw(body), "m")

    assert caught.value.status == status
    error = json.loads(caught.value.body())["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["code"] == ("model_not_found" if status == 404 else None)


@pytest.mark.parametrize(
    "sent", [b"", b"{", b"\xff", b'{"a":1}x', b"[" * 100_000, json.dumps(CHAT).encode("utf-16"), b"\xef\xbb\xbf{}"]
)
def test_what_is_not_json_is_refused(sent: bytes) -> None:
    with pytest.raises(ApiError, match="body: wanted JSON"):
        read(Endpoint.CHAT, sent, "m")


PIECES = [
    *'{}[]:,"-+.eE0159 \n\t\\/tfnau',
    *(
        "true",
        "null",
        "NaN",
        "Infinity",
        "1e400",
        "-0",
        "\\u00e9",
        "\\ud83d",
        "\\ude42",
        "\U0001f642",
        '"a":',
        "\x00",
        "\x7f",
    ),
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | values.map(json.dumps))
def test_a_body_is_what_pythons_parser_makes_of_it_as_the_engines_does(text: str) -> None:
    sent = f'{{"model": "m", "prompt": "x", "seed": {text}}}'
    try:
        wanted = json.loads(sent)
    except ValueError:
        with pytest.raises(ApiError, match="body: wanted JSON"):
            read(Endpoint.COMPLETIONS, sent.encode(), "m")
        return
    assert repr(read(Endpoint.COMPLETIONS, sent.encode(), "m").body) == repr(wanted)


def test_ids_that_the_client_sent_are_not_sent_twice() -> None:
    request = read(Endpoint.COMPLETIONS, raw({"model": "m", "prompt": [5, 6, 7]}), "m")
    mine = request.body["prompt"]
    assert leg_body(request, "r", mine, ROOM, keep_stream=True).count(b"prompt") == 1
    longer = leg_body(request, "r", [*mine, 8], ROOM, keep_stream=True)
    assert json.loads(longer)["prompt"] == [5, 6, 7, 8]


@pytest.mark.parametrize("wrong", [True, 1.0, -1, 2**32, None, "7", 2**70])
def test_a_prompt_with_something_else_between_its_ids_is_refused(wrong: Any) -> None:
    with pytest.raises(ApiError, match="prompt: wanted token ids"):
        read(Endpoint.COMPLETIONS, raw({"model": "m", "prompt": [1, wrong, 2**32 - 1]}), "m")


def test_a_huge_body_is_refused() -> None:
    with pytest.raises(ApiError) as caught:
        read(Endpoint.CHAT, b" " * (MAX_BODY_BYTES + 1), "m")

    assert caught.value.status == 413


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers() -> None:
    request = read(Endpoint.CHAT, raw({**CHAT, "max_tokens": 30}), "m")

    check_length(request, prompt_tokens=70, context_tokens=100)
    with pytest.raises(ApiError, match=r"71 tokens of prompt and 30 of completion are 101, .* context is 100"):
        check_length(request, prompt_tokens=71, context_tokens=100)
    with pytest.raises(ApiError, match=r"the prompt has 100 tokens, .* context is 100") as caught:
        check_length(request, prompt_tokens=100, context_tokens=100)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"


def test_a_completion_without_a_limit_has_the_apis_own() -> None:
    assert read(Endpoint.COMPLETIONS, raw(COMPLETION), "m").max_new_tokens == 16
    assert read(Endpoint.CHAT, raw(CHAT), "m").max_new_tokens is None
    assert read(Endpoint.CHAT, raw({**CHAT, "max_tokens": 5, "max_completion_tokens": 7}), "m").max_new_tokens == 7


@pytest.mark.parametrize("name", ["cache_salt", "extra_key"])
def test_a_salt_that_is_no_text_in_utf8_is_refused_by_name(name: str) -> None:
    with pytest.raises(ApiError) as refused:
        read(Endpoint.CHAT, raw({**CHAT, name: "a\ud800"}), "m")

    assert (refused.value.status, refused.value.param) == (400, name)
    assert refused.value.message == f"{name}: wanted text in UTF-8, found half a surrogate pair"
    assert read(Endpoint.CHAT, raw({**CHAT, name: "a\U0001f642"}), "m").salt == "a\U0001f642"


@pytest.mark.parametrize(
    ("prompt", "names"),
    [("hi", ["r"]), ([1, 2], ["r"]), (["hi"], ["r_0"]), (["a", "b"], ["r_0", "r_1"]), ([[1], [2, 3]], ["r_0", "r_1"])],
)
def test_the_engine_names_each_prompt_of_a_batch(prompt: Any, names: list[str]) -> None:
    assert engine_rids(read(Endpoint.COMPLETIONS, raw({**COMPLETION, "prompt": prompt}), "m"), "r") == names


def test_the_engine_keeps_the_name_of_a_chat() -> None:
    assert engine_rids(read(Endpoint.CHAT, raw({**CHAT, "prompt": ["a"]}), "m"), "r") == ["r"]
