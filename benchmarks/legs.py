"""A request without the router: both legs sent by hand, as the router sends them."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.client import Answer, ask_ready, streaming
from engine.spec import WorkerSpec


@dataclass(frozen=True)
class Pair:
    """Where the two legs of a request go, and where they meet."""

    prefill_url: str
    decode_url: str
    bootstrap_host: str
    bootstrap_port: int

    @classmethod
    def of(cls, prefill: WorkerSpec, decode: WorkerSpec) -> Pair:
        prefill_url, decode_url = (f"http://{one.host}:{one.port}" for one in (prefill, decode))
        return cls(prefill_url, decode_url, prefill.host, prefill.handoff_port)

    def meeting(self) -> dict[str, Any]:
        """What both legs of one request say besides the request."""
        return {
            "bootstrap_host": self.bootstrap_host,
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": random.randint(1, 2**62),
        }


def direct(pair: Pair, model: str, prompt: str | list[int], max_tokens: int) -> Answer:
    """At temperature 0; timed at the decode worker's stream, from when the first leg is sent."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= pair.meeting()
    # Both ready before the clock begins, as with one worker: what a client spends on its own is no worker's time.
    prefill_payload, decode_payload = json.dumps(body), streaming(body)
    other_leg = threading.Thread(target=_post, args=(pair.prefill_url, prefill_payload))
    started_s = time.perf_counter()
    other_leg.start()
    answer = ask_ready(pair.decode_url, "/v1/completions", decode_payload, started_s)
    other_leg.join()
    return answer


def _post(url: str, payload: str) -> None:
    """Reads the answer to its end, whatever it is: decode's leg tells what came of the request."""
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=300)
    try:
        connection.request("POST", "/v1/completions", payload, {"content-type": "application/json"})
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return
    finally:
        connection.close()
