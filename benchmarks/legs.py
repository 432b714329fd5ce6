"""A request without the router: both legs sent by hand, as the router sends them."""

from __future__ import annotations

import http.client
import json
import random
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.client import Answer, ask
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
    """At temperature 0; timed at the decode worker's stream."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= pair.meeting()
    other_leg = threading.Thread(target=_post, args=(pair.prefill_url, body))
    other_leg.start()
    answer = ask(pair.decode_url, "/v1/completions", body)
    other_leg.join()
    return answer


def _post(url: str, body: dict[str, Any]) -> None:
    """Reads the answer to its end, whatever it is: decode's leg tells what came of the request."""
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=300)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return
    finally:
        connection.close()
