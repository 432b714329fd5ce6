"""Which event tells that a layer is computed, whatever layers come by, and in whatever order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.forward_passes import ForwardPasses

STREAM, OTHER = 1, 2


class Stream:
    """What was put into one: layers computed, events recorded."""

    def __init__(self) -> None:
        self.order: list[tuple[str, int]] = []
        self.current = STREAM

    def record(self, event: int, stream: int) -> None:
        assert stream == STREAM
        self.order.append(("event", event))

    def compute(self, layer: int) -> None:
        self.order.append(("layer", layer))

    def computed_by(self, event: int) -> set[int]:
        """The layers that are done when the event is."""
        last = max(number for number, one in enumerate(self.order) if one == ("event", event))
        return {layer for kind, layer in self.order[:last] if kind == "layer"}


def passes_of(stream: Stream, layers: int, sets: int = 2) -> ForwardPasses:
    return ForwardPasses(
        [[100 * number + layer for layer in range(layers)] for number in range(sets)],
        stream.record,
        lambda: stream.current,
    )


def test_each_layer_has_its_event_where_all_come_by() -> None:
    stream = Stream()
    passes = passes_of(stream, 4)
    passes.begin(STREAM)
    for layer in range(4):
        passes.reaches(layer)
        stream.compute(layer)
    events = passes.end().events
    assert [stream.computed_by(event) for event in events] == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]
    passes.begin(STREAM)
    assert set(passes.end().events).isdisjoint(events), "the next pass has other ones"


@given(st.integers(1, 6), st.data())
def test_no_event_comes_before_its_layer_in_whatever_order_layers_are_computed(
    layers: int, data: st.DataObject
) -> None:
    """As where a model has its layers run several times, or numbers them otherwise."""
    stream = Stream()
    passes = passes_of(stream, layers)
    order = data.draw(st.lists(st.integers(0, layers - 1), max_size=2 * layers), "order")
    passes.begin(STREAM)
    for layer in order:
        passes.reaches(layer)
        stream.compute(layer)
    for layer, event in enumerate(passes.end().events):
        last = max((number for number, one in enumerate(stream.order) if one == ("layer", layer)), default=-1)
        assert stream.order.index(("event", event), last + 1) > last


@given(st.integers(1, 12), st.data())
def test_no_event_comes_before_its_layer_whatever_comes_by(layers: int, data: st.DataObject) -> None:
    """Layers that are skipped, come twice, are put into another stream, or are no layer of the pool."""
    stream = Stream()
    passes = passes_of(stream, layers)
    for _ in range(3):
        stream.order.clear()
        passes.begin(STREAM)
        for layer in range(layers):
            if data.draw(st.booleans(), "comes by"):
                stream.current = data.draw(st.sampled_from([STREAM, OTHER]), "stream")
                for _ in range(data.draw(st.integers(1, 2), "times")):
                    passes.reaches(layer)
                stream.current = STREAM
            stream.compute(layer)
        if data.draw(st.booleans(), "a draft model's"):
            passes.reaches(data.draw(st.integers(0, layers + 3), "layer"))
        events = passes.end().events
        assert len(events) == layers
        for layer, event in enumerate(events):
            assert set(range(layer + 1)) <= stream.computed_by(event)
