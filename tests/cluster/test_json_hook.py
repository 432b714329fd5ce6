"""That a worker reads JSON as SGLang's own server would, whatever it is."""

from __future__ import annotations

import asyncio
import json
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sglang")
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.plugins.hook_registry import HookRegistry
from starlette.requests import ClientDisconnect, Request

from engine.between_steps import BetweenSteps
from engine.sglang_json import LONG_BYTES, JsonHook, register
from engine.spec import SPEC_VARIABLE

pytestmark = [pytest.mark.filterwarnings("ignore")]
read = JsonHook(BetweenSteps()).read
JSON = {"content-type": "application/json"}
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def request_of(raw: bytes) -> Request:
    sent = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not sent:
            await asyncio.Event().wait()
        return sent.pop()

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def found(raw: bytes) -> str:
    """Also where it is no JSON: what the parser says of it."""
    request = request_of(raw)

    async def twice() -> Any:
        first = await read(Request.json, request)
        assert await read(Request.json, request) is first
        return first

    try:
        return repr(asyncio.run(twice()))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def wanted(raw: bytes) -> str:
    try:
        return repr(json.loads(raw))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SPEC_VARIABLE, "a file")


@given(values, st.sampled_from(["utf-8", "utf-16", "utf-8-sig"]), st.booleans())
def test_any_json_is_what_pythons_parser_makes_of_it(value: Any, encoding: str, ascii: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii).encode(encoding, "surrogatepass")
    assert found(raw) == wanted(raw)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b'{"a": 1,}', b'{"a": 1, "a": 2}', b"1e999", b"123456789012345678901234567890", b'"\\ud800"', b"\xff"],
)
def test_what_is_odd_or_no_json_is_pythons_to_judge(raw: bytes) -> None:
    assert found(raw) == wanted(raw)


def test_another_sglang_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPEC_VARIABLE)
    asked = []

    async def original(request: Request) -> str:
        asked.append(request)
        return "its own"

    assert asyncio.run(read(original, request_of(b"[1]"))) == "its own"
    assert len(asked) == 1


def test_it_is_asked_for_what_a_route_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name by which the hook is registered, and by the FastAPI that SGLang has."""
    register()
    target = next(name for name in HookRegistry._hooks if name.endswith("Request.json"))
    assert pkgutil.resolve_name(target) is Request.json
    original, asked = Request.json, []

    async def hooked(request: Request) -> Any:
        asked.append(await read(original, request))
        return asked[-1]

    monkeypatch.setattr(Request, "json", hooked)
    app = FastAPI()

    @app.post("/")
    async def route(body: dict[str, Any]) -> dict[str, Any]:
        return body

    with TestClient(app) as client:
        assert client.post("/", content=b'{"a": [1, 2]}', headers=JSON).json() == {"a": [1, 2]}
    assert asked == [{"a": [1, 2]}]


class Manager:
    """As much of SGLang's as the hook looks at."""

    def __init__(self, mode: str) -> None:
        self.server_args = SimpleNamespace(disaggregation_mode=mode)
        self.rid_to_state = {
            "waits for its pages": SimpleNamespace(output_ids=[]),
            "runs": SimpleNamespace(output_ids=[7]),
        }


@pytest.mark.parametrize(
    ("mode", "length", "waits"), [("decode", LONG_BYTES, True), ("decode", 9, False), ("prefill", LONG_BYTES, False)]
)
def test_a_decode_worker_takes_a_long_body_in_behind_the_next_steps_tokens(mode: str, length: int, waits: bool) -> None:
    hook, manager, said = JsonHook(BetweenSteps()), Manager(mode), []

    async def step() -> None:
        async def original(_manager: Any, _received: Any) -> None:
            said.append("tokens")

        await hook.output(original, manager, "a step")

    async def taken_in() -> None:
        assert await hook.read(Request.json, request_of(json.dumps("x" * length).encode())) == "x" * length
        said.append("body")

    async def both() -> None:
        await step()
        taking = asyncio.create_task(taken_in())
        await asyncio.sleep(0.01)
        await step()
        await taking

    asyncio.run(both())
    assert said == (["tokens", "tokens", "body"] if waits else ["tokens", "body", "tokens"])


def test_one_whose_client_is_gone_meanwhile_is_not_taken_in() -> None:
    """Its abort came before SGLang knew of it."""
    hook, manager = JsonHook(BetweenSteps()), Manager("decode")
    sent: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"1" * (LONG_BYTES + 1), "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return sent.pop(0)

    async def step() -> None:
        async def original(*_arguments: Any) -> None:
            pass

        await hook.output(original, manager, "a step")

    async def left() -> None:
        await step()
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        taking = asyncio.create_task(hook.read(Request.json, request))
        await asyncio.sleep(0.01)
        await step()
        with pytest.raises(ClientDisconnect):
            await taking

    asyncio.run(left())


def test_when_the_last_stream_is_over_nothing_waits() -> None:
    hook, manager = JsonHook(BetweenSteps()), Manager("decode")

    async def original(*_arguments: Any) -> None:
        manager.rid_to_state.pop("runs", None)

    async def over() -> None:
        await hook.output(original, manager, "the last step")
        taking = asyncio.create_task(hook.read(Request.json, request_of(b"1" * (LONG_BYTES + 1))))
        for _ in range(3):
            await asyncio.sleep(0)
        assert taking.done()
        taking.exception()

    asyncio.run(over())
