"""Which step decode's grants wait for. SGLang's own objects are stood for by ones with the same fields."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
# SGLang warns of what a CPU lacks when it is imported.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

STREAM = object()


class Event:
    """Of a GPU that gets nowhere."""

    def record(self, stream: Any) -> None:
        assert stream is STREAM

    def query(self) -> bool:
        return False


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _device: SimpleNamespace(Event=Event))


def request(*, finished: bool = False, retracted: bool = False) -> SimpleNamespace:
    return SimpleNamespace(finished=lambda: finished, is_retracted=retracted)


def queue(*requests: SimpleNamespace, idle: bool = False, overlap: bool = True, device: str = "cuda") -> Any:
    """Decode's, with these requests in the step that is under way."""
    scheduler = SimpleNamespace(
        enable_overlap=overlap,
        device=device,
        last_batch=None if idle else SimpleNamespace(reqs=list(requests)),
        forward_stream=STREAM,
    )
    return SimpleNamespace(kv_manager=SimpleNamespace(stale_step=None), scheduler=scheduler, queue=["waits"])


def asked(one: Any) -> Any:
    from engine.sglang_landing import LandingHook

    LandingHook().about_to_grant(one, None)
    return one.kv_manager.stale_step


@pytest.mark.parametrize("how", ["finished", "retracted"])
def test_pages_wait_for_a_step_that_computes_who_has_none_any_more(how: str) -> None:
    mark = asked(queue(request(), request(finished=how == "finished", retracted=how == "retracted")))
    assert mark is not None
    assert not mark.reached()


def test_they_wait_for_no_other() -> None:
    gone = request(finished=True)
    nobody = queue(gone)
    nobody.queue.clear()
    for one in (
        queue(request(), request()),
        queue(idle=True),
        queue(gone, overlap=False),
        # Its computing is over when the scheduler goes on.
        queue(gone, device="cpu"),
        nobody,
    ):
        one.kv_manager.stale_step = "of the tick before"
        assert asked(one) is None


def test_a_manager_of_sglangs_own_is_left_alone() -> None:
    from engine.sglang_landing import LandingHook

    one = queue(request(finished=True))
    one.kv_manager = SimpleNamespace()
    LandingHook().about_to_grant(one)
    assert vars(one.kv_manager) == {}
