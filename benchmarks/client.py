"""One request over the API, timed: what a user's own client would see, and no more."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

DECODES = {"x-mainstem-resume": "never"}
"""Of a stream that may not go on elsewhere, the router takes no first token from prefill: it is decode's."""


@dataclass
class Answer:
    """An answer and its clock. Times are seconds from when the request was sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    ttft_s: float | None = None
    """To the first token's text; None where there was none."""
    first_s: float | None = None
    """To the first event of a choice, also one whose text is empty yet."""
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    sent_s: float = 0.0
    """When the request was sent, of `time.perf_counter`."""

    @property
    def prefill(self) -> str:
        return self.headers.get("x-mainstem-prefill", "-")

    @property
    def decode(self) -> str:
        return self.headers.get("x-mainstem-decode", "-")

    @property
    def matched_tokens(self) -> int:
        return int(self.headers.get("x-mainstem-matched-tokens", 0))

    @property
    def cached_tokens(self) -> int:
        """As the engine reported it; it leaves the field out where nothing was cached."""
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    @property
    def prompt_tokens(self) -> int:
        return int(self.usage.get("prompt_tokens", 0))


def ask(
    url: str, path: str, body: dict[str, Any], timeout_s: float = 300.0, headers: dict[str, str] | None = None
) -> Answer:
    """Sends the body as a streaming request and reads the stream to its end. Never raises: see `error`."""
    payload = streaming(body)
    return ask_ready(url, path, payload, time.perf_counter(), timeout_s, headers)


def streaming(body: dict[str, Any]) -> str:
    """The body of a request whose answer is to be streamed, ready to be sent."""
    return json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})


def ask_ready(
    url: str,
    path: str,
    payload: str,
    started_s: float,
    timeout_s: float = 300.0,
    headers: dict[str, str] | None = None,
) -> Answer:
    """As `ask`, with a body that is ready, and a clock that began at `started_s` of `time.perf_counter`."""
    target = urlsplit(url)
    answer = Answer(sent_s=started_s)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=timeout_s)
    try:
        connection.request("POST", path, payload, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        answer.status = response.status
        answer.headers = {name.lower(): value for name, value in response.getheaders()}
        if response.status != 200:
            answer.error = response.read().decode(errors="replace")[:500]
        else:
            _read_stream(response, answer, started_s)
    except (OSError, http.client.HTTPException) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        answer.total_s = time.perf_counter() - started_s
        connection.close()
    return answer


def chat(url: str, model: str, messages: list[dict[str, str]], max_tokens: int, **fields: Any) -> Answer:
    """A chat request at temperature 0."""
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, **fields}
    return ask(url, "/v1/chat/completions", body)


def complete(
    url: str,
    model: str,
    prompt: str | list[int],
    max_tokens: int,
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> Answer:
    """A completion request at temperature 0."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
    return ask(url, "/v1/completions", body, headers=headers)


def post_json(url: str, path: str, body: dict[str, Any], timeout_s: float = 300.0) -> Any:
    """A POST's JSON, not streamed. Raises OSError where nobody answers, ValueError where it is no success."""
    return _exchange(url, "POST", path, json.dumps(body), timeout_s)


def get_json(url: str, path: str, timeout_s: float = 5.0) -> Any:
    """A GET's JSON. Raises OSError where nobody answers, ValueError where it is no JSON or no success."""
    return _exchange(url, "GET", path, None, timeout_s)


def _exchange(url: str, method: str, path: str, body: str | None, timeout_s: float) -> Any:
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=timeout_s)
    try:
        connection.request(method, path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise ValueError(f"{path}: wanted 200, found {response.status} {content[:300].decode(errors='replace')}")
        return json.loads(content)
    finally:
        connection.close()


def _read_stream(response: http.client.HTTPResponse, answer: Answer, started_s: float) -> None:
    finished = False
    for line in response:
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            finished = True
            continue
        event = json.loads(data)
        if "error" in event:
            answer.error = json.dumps(event["error"])
            continue
        answer.usage = event.get("usage") or answer.usage
        if event.get("choices") and answer.first_s is None:
            answer.first_s = time.perf_counter() - started_s
        for choice in event.get("choices", []):
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if text and answer.ttft_s is None:
                answer.ttft_s = time.perf_counter() - started_s
            answer.text += text
    if not finished and not answer.error:
        answer.error = "the stream ended without [DONE]"
