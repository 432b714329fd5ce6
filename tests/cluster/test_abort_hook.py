"""Which requests of a prefill worker an abort reaches besides those that SGLang sees to.

SGLang's scheduler is stood for by what its abort does to its queues.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")
# SGLang warns of what a CPU lacks when it is imported.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a worker of ours."""
    from engine.sglang_plugin import WorkerHooks
    from engine.spec import SPEC_VARIABLE, WorkerSpec

    spec = WorkerSpec(
        name="prefill-0",
        role="prefill",
        host="",
        port=0,
        events_port=0,
        replay_port=0,
        model_path="",
        served_model="",
        page_tokens=16,
        key_file="",
        run_dir="",
    )
    file = tmp_path / "spec.json"
    file.write_bytes(msgspec.json.encode(spec))
    monkeypatch.setenv(SPEC_VARIABLE, str(file))
    return WorkerHooks()


def request(*, pending: bool = False, finishing: bool = False) -> SimpleNamespace:
    aborts: list[bool] = []
    sender = SimpleNamespace(abort=lambda: aborts.append(True))
    return SimpleNamespace(disagg_kv_sender=sender, aborts=aborts, pending_bootstrap=pending, to_finish=finishing)


def scheduler(waiting: list[Any], running: list[Any], chunked: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        waiting_queue=waiting,
        running_batch=SimpleNamespace(reqs=[]),
        last_batch=SimpleNamespace(reqs=running),
        chunked_req=chunked,
        disagg_prefill_bootstrap_queue="one",
    )


def test_one_that_waited_and_one_that_is_computed_before_its_grant_let_go_of_their_rooms(hooks: Any) -> None:
    waited, stays, computed, granted, goes_on = request(), request(), request(pending=True), request(), request()
    goes_on.pending_bootstrap = True
    one = scheduler([waited, stays], [computed, granted, goes_on])

    def original(found: Any, _abort: Any) -> None:
        found.waiting_queue.remove(waited)
        computed.to_finish = granted.to_finish = True

    hooks.aborted(original, one, "all of theirs")
    assert [len(each.aborts) for each in (waited, stays, computed, granted, goes_on)] == [1, 0, 1, 0, 0]


def test_one_with_chunks_to_come_is_left_to_sglang(hooks: Any) -> None:
    chunked = request(pending=True, finishing=True)
    hooks.aborted(lambda *_arguments: None, scheduler([], [chunked], chunked), "it")
    assert chunked.aborts == []


def test_a_decode_worker_is_left_alone(hooks: Any) -> None:
    one = scheduler([], [request(pending=True, finishing=True)])
    one.disagg_prefill_bootstrap_queue = None
    hooks.aborted(lambda *_arguments: None, one, "it")
    assert one.last_batch.reqs[0].aborts == []
