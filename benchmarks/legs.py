"""A request without the router: both legs sent by hand, as the router sends them."""

from __future__ import annotations

import http.client
import json
import random
import threading
from typing import Any
from urllib.parse import urlsplit

from benchmarks.client import Answer, ask
from engine.spec import WorkerSpec


def direct(prefill: WorkerSpec, decode: WorkerSpec, model: str, prompt: str | list[int], max_tokens: int) -> Answer:
    """At temperature 0; timed at the decode worker's stream."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "bootstrap_host": prefill.host,
        "bootstrap_port": prefill.handoff_port,
        "bootstrap_room": random.randint(1, 2**62),
    }
    other_leg = threading.Thread(target=_post, args=(f"http://{prefill.host}:{prefill.port}", body))
    other_leg.start()
    answer = ask(f"http://{decode.host}:{decode.port}", "/v1/completions", body)
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
