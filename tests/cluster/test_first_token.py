"""A first token that prefill says, on real SGLang: what clients read is what decode alone would have said, and a decode
worker that stands still behind it costs them time alone."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

from benchmarks.bench_cluster import scheduler_of
from benchmarks.client import DECODES, Answer, ask, get_json
from benchmarks.words import sentence
from engine.launch.cluster import Cluster
from tests.cluster.conftest import local_cpu, started


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Prefill that waits for no decode worker, and two of those."""
    config = local_cpu()
    prefill, decode = config.workers
    groups = (
        prefill.model_copy(update={"count": 1, "engine": prefill.engine | {"optimistic-prefill-attempts": 1}}),
        decode.model_copy(update={"count": 2}),
    )
    with started(config.model_copy(update={"workers": groups}), tmp_path_factory.mktemp("first")) as made:
        yield made


def asked(cluster: Cluster, path: str, number: int, headers: dict[str, str] | None = None) -> Answer:
    text = sentence(number, 40)
    prompt: dict[str, Any] = (
        {"prompt": text} if "chat" not in path else {"messages": [{"role": "user", "content": text}]}
    )
    body = {"model": cluster.plan.router.model, "max_tokens": 12, "temperature": 0, **prompt}
    answer = ask(cluster.url, path, body, headers=headers)
    assert answer.error == ""
    return answer


def told(cluster: Cluster, answer: Answer) -> dict[str, Any]:
    """The router's record of it, once it is over."""
    while True:
        record: dict[str, Any] = get_json(cluster.url, f"/api/explain/{answer.headers['x-request-id']}")
        if record["outcome"] != "running":
            return record
        time.sleep(0.02)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_clients_read_what_decode_alone_would_have_said(cluster: Cluster, path: str) -> None:
    by_prefill = 0
    for number in range(6):
        one, other = asked(cluster, path, number), asked(cluster, path, number, DECODES)

        assert one.text == other.text
        assert one.usage["completion_tokens"] == other.usage["completion_tokens"] == 12
        assert told(cluster, other)["first_token_from"] == "decode"
        by_prefill += told(cluster, one)["first_token_from"] == "prefill"
    # Half a character is not said before its other half.
    assert by_prefill >= 4


def test_prefill_says_that_it_computes_before_decode_grants_pages(cluster: Cluster) -> None:
    """In fields of SGLang's that the agent reads."""
    [prefill] = [worker for worker in cluster.plan.workers if worker.role == "prefill"]
    facts = get_json(f"http://{prefill.host}:{prefill.port}", "/server_info")
    assert facts["optimistic_prefill_attempts"] == 1
    assert isinstance(facts["chunked_prefill_size"], int)


def test_no_detokenizer_is_on_its_way(cluster: Cluster) -> None:
    """All of them stand still until the client has the token that prefill says: decode cannot say it meanwhile."""
    wanted = asked(cluster, "/v1/completions", 50, DECODES).text
    detokenizers = [
        process
        for worker in cluster.workers.values()
        for process in psutil.Process(worker).children(recursive=True)
        if "detokenizer" in process.cmdline()[0]
    ]
    assert len(detokenizers) == 3
    body = {"model": cluster.plan.router.model, "max_tokens": 12, "temperature": 0, "prompt": sentence(50, 40)}
    request = urllib.request.Request(
        cluster.url + "/v1/completions",
        json.dumps({**body, "stream": True}).encode(),
        {"content-type": "application/json"},
    )
    for process in detokenizers:
        process.suspend()
    with ExitStack() as later:
        for process in detokenizers:
            later.callback(process.resume)
        with urllib.request.urlopen(request, timeout=60) as response:
            first = response.readline()
            later.close()
            rest = response.read()
            rid = response.headers["x-request-id"]

    events = [json.loads(line[6:]) for line in (first + rest).split(b"\n") if line.startswith(b"data: {")]
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == wanted
    assert get_json(cluster.url, f"/api/explain/{rid}")["first_token_from"] == "prefill"


def test_a_decode_worker_that_is_frozen_behind_it_costs_time_alone(cluster: Cluster) -> None:
    wanted = [asked(cluster, "/v1/completions", 100 + number, DECODES).text for number in range(4)]
    frozen = [cluster.workers["decode-0"], scheduler_of(cluster, "decode-0").pid]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda number: asked(cluster, "/v1/completions", 100 + number), range(4)))
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)

    assert [answer.text for answer in answers] == wanted
    records = [told(cluster, answer) for answer in answers]
    cut_off = [record for record in records if record["tries"][0]["decode"] == "decode-0"]
    assert cut_off, "nobody was sent to the frozen one"
    for record in cut_off:
        assert record["first_token_from"] == "prefill"
        assert record["tries"][0]["then"] == "resume"
