"""Clients of a cluster that is being disturbed, and what each of their requests came to."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from benchmarks.reference import Reference

HANG_S = 60.0
"""Whoever has neither its answer nor an error by then hangs. No fault lasts half as long."""
PULSE_TOKENS = 4


class Verdict(StrEnum):
    OK = "ok"
    CLEAN_ERROR = "clean_error"
    """An HTTP error or an event of the stream, in OpenAI's shape."""
    CUT = "cut"
    """The connection ended before the answer did: what a client sees of a router that was killed."""
    HANG = "hang"
    EMPTY_200 = "empty_200"
    WRONG_OUTPUT = "wrong_output"


@dataclass
class Asked:
    """One request, on a thread of its own."""

    url: str
    model: str
    reference: Reference
    stream: bool
    tokens: int
    rid: str = ""
    status: int = 0
    text: str = ""
    error: str = ""
    cut: bool = False
    finished: bool = False
    events: int = 0
    """Events with text so far."""
    began_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    """Until the first text."""
    took_s: float = 0.0

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def wait_for(self, tokens: int, timeout_s: float) -> None:
        """Until so many tokens have come, or it is over."""
        deadline_s = time.monotonic() + timeout_s
        while self.events < tokens and not self.over and time.monotonic() < deadline_s:
            time.sleep(0.005)

    def verdict(self) -> Verdict:
        """Waits for its end, at most until it hangs."""
        self._thread.join(max(0.0, self.began_s + HANG_S - time.monotonic()))
        if not self.over:
            return Verdict.HANG
        if self.error:
            return Verdict.CLEAN_ERROR
        if self.cut or not self.finished:
            return Verdict.CUT
        if not self.text:
            return Verdict.EMPTY_200
        return Verdict.OK if self.text == expected(self.reference, self.tokens) else Verdict.WRONG_OUTPUT

    def _ask(self) -> None:
        target = urlsplit(self.url)
        body = {
            "model": self.model,
            "prompt": self.reference.prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": self.stream,
        }
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=HANG_S)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            self.status, self.rid = response.status, response.getheader("x-request-id") or ""
            if self.stream and response.status == 200:
                self._read(response)
            else:
                self._take(response.status, response.read())
        except TimeoutError:
            # It hangs: `verdict` says so, as this thread is still there then.
            time.sleep(HANG_S)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.cut = True
            self.text += f" [{type(error).__name__}]"
        finally:
            self.took_s = time.monotonic() - self.began_s
            connection.close()

    def _take(self, status: int, raw: bytes) -> None:
        answer = json.loads(raw)
        if status != 200:
            self.error = _clean(answer)
            return
        self.text = answer["choices"][0]["text"]
        self.finished = answer["choices"][0]["finish_reason"] is not None

    def _read(self, response: http.client.HTTPResponse) -> None:
        ended = False
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line[6:].strip() == b"[DONE]":
                self.finished = ended
                return
            event = json.loads(line[6:])
            if "error" in event:
                self.error = _clean(event)
                return
            for choice in event.get("choices", []):
                if choice["text"]:
                    self.first_s = self.first_s or time.monotonic() - self.began_s
                    self.events += 1
                    self.text += choice["text"]
                ended = ended or choice["finish_reason"] is not None


def expected(reference: Reference, tokens: int) -> str:
    """The text of its first tokens."""
    return reference.text if tokens >= len(reference.tokens) else "".join(reference.tokens[:tokens])


class Pulse:
    """One small request after the other: how long nobody could have had an answer."""

    def __init__(self, url: str, model: str, reference: Reference) -> None:
        self.asked: list[Asked] = []
        self.worst_gap_s = 0.0
        self._make: Callable[[], Asked] = lambda: Asked(url, model, reference, stream=True, tokens=PULSE_TOKENS)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(2 * HANG_S)

    def _beat(self) -> None:
        well_s = time.monotonic()
        while not self._over.is_set():
            one = self._make()
            self.asked.append(one)
            if one.verdict() is Verdict.OK:
                now_s = time.monotonic()
                self.worst_gap_s, well_s = max(self.worst_gap_s, now_s - well_s), now_s
            self._over.wait(0.5)


def _clean(answer: Any) -> str:
    """What an error says. Raises ValueError where it is not in OpenAI's shape."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict) or {"message", "type", "code"} - set(error):
        raise ValueError("an error without a shape")
    return f"{error['code']}: {error['message']}"
