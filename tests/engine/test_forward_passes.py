"""Which event tells that layers are computed, whatever layers come by, and in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from engine.forward_passes import Events, ForwardPasses

STREAM, OTHER = 1, 2


class Stream:
    """What was put into one: layers computed, events recorded."""

    def __init__(self) -> None:
        self.order: list[tuple[str, int | str]] = []
        self.current = STREAM

    def record(self, event: str, stream: int) -> None:
        assert stream == STREAM
        self.order.append(("event", event))

    def compute(self, layer: int) -> None:
        self.order.append(("layer", layer))

    def when(self, event: str) -> int:
        return max(number for number, one in enumerate(self.order) if one == ("event", event))

    def nothing_after(self, event: str, layers: int) -> bool:
        """Whether the first layers, and all of them, are computed for the last time when the event is."""
        return not any(kind == "layer" and int(one) < layers for kind, one in self.order[self.when(event) :])


@dataclass(frozen=True)
class Reached:
    """An event of a stream whose work is done as it comes."""

    event: str
    order: list[tuple[str, int | str]]

    def reached(self) -> bool:
        return ("event", self.event) in self.order


def passes_of(stream: Stream, layers: int, sets: int = 2, *, apart: bool = True) -> ForwardPasses:
    events = [Events(f"before {number}", f"nearly {number}", f"done {number}") for number in range(sets)]
    mark: Callable[[str], Reached] = lambda event: Reached(event, stream.order)  # noqa: E731
    return ForwardPasses(layers, events, stream.record, lambda: stream.current, mark, apart=apart)


def test_most_layers_are_known_to_be_computed_before_the_pass_is_over() -> None:
    stream = Stream()
    passes = passes_of(stream, 32)
    passes.begin(STREAM)
    for layer in range(32):
        passes.reaches(layer)
        stream.compute(layer)
    first = passes.end()
    assert (first.layers, stream.when(first.before)) == (31, 0)
    assert stream.order[stream.when(first.nearly) + 1] == ("layer", 31)
    assert stream.when(first.done) == len(stream.order) - 1
    passes.begin(STREAM)
    second = passes.end()
    assert {second.before, second.done}.isdisjoint({first.before, first.nearly, first.done}), "others have other ones"
    assert (second.nearly, second.layers, second.soon) == (None, 0, None)


def test_a_pass_whose_layers_are_not_told_apart_says_when_its_last_one_begins() -> None:
    stream = Stream()
    passes = passes_of(stream, 32, apart=False)
    for _ in range(2):
        passes.begin(STREAM)
        for layer in range(32):
            passes.reaches(layer)
            stream.compute(layer)
        computed = passes.end()
        assert (computed.nearly, computed.layers) == (None, 0)
        assert isinstance(computed.soon, Reached)
        assert stream.order[stream.when(computed.soon.event) + 1] == ("layer", 31)
    passes.begin(STREAM)
    passes.reaches(32)
    assert passes.end().soon is None, "a draft model's layer says nothing of this one's"


@given(st.integers(1, 40), st.data())
def test_no_event_comes_before_its_layers_in_whatever_order_they_are_computed(layers: int, data: st.DataObject) -> None:
    """As where a model has its layers run several times, or numbers them otherwise."""
    stream = Stream()
    passes = passes_of(stream, layers)
    straight = list(range(layers))
    order = data.draw(st.lists(st.integers(0, layers - 1), max_size=layers).map(lambda more: straight + more), "order")
    if data.draw(st.booleans(), "shuffled"):
        order = data.draw(st.permutations(order), "in this order")
    passes.begin(STREAM)
    for layer in order:
        passes.reaches(layer)
        stream.compute(layer)
    check(stream, passes, layers)


@given(st.integers(1, 40), st.data())
def test_no_event_comes_before_its_layers_whatever_comes_by(layers: int, data: st.DataObject) -> None:
    """Layers that are skipped, come twice, are put into another stream, or are no layer of the pool."""
    stream = Stream()
    passes = passes_of(stream, layers)
    for _ in range(3):
        stream.order.clear()
        passes.begin(STREAM)
        odd = data.draw(st.sets(st.integers(0, layers - 1), max_size=2), "layers that are odd")
        for layer in range(layers):
            times = data.draw(st.integers(0, 2), "times") if layer in odd else 1
            if layer in odd:
                stream.current = data.draw(st.sampled_from([STREAM, OTHER]), "stream")
            for _ in range(times):
                passes.reaches(layer)
            stream.current = STREAM
            stream.compute(layer)
        if data.draw(st.booleans(), "a draft model's"):
            passes.reaches(data.draw(st.integers(0, layers + 3), "layer"))
        check(stream, passes, layers)


def check(stream: Stream, passes: ForwardPasses, layers: int) -> None:
    computed = passes.end()
    assert stream.when(computed.before) == 0
    assert stream.nothing_after(computed.done, layers)
    assert (computed.nearly is None) == (computed.layers == 0)
    if computed.nearly is not None:
        assert computed.layers == layers - 1
        assert stream.nothing_after(computed.nearly, computed.layers)
