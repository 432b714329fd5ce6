"""The matrix of bandwidths says what a dictionary of pairs would, whoever comes and goes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.bandwidths import Bandwidths
from router.fit import RobustMean

USUAL_S = 1e-9
names = st.sampled_from([f"w{number}" for number in range(6)])
learned = st.tuples(names, names, st.sampled_from([1e-10, 1e-9, 3e-8]))
acts = st.lists(st.one_of(learned, names), max_size=60)


@settings(max_examples=150, deadline=None)
@given(acts)
def test_every_pair_is_as_in_a_dictionary_of_means(acts: list[tuple[str, str, float] | str]) -> None:
    bandwidths, usual = Bandwidths(USUAL_S), RobustMean(USUAL_S)
    means: dict[tuple[str, str], RobustMean] = {}
    for act in acts:
        if isinstance(act, str):
            bandwidths.forget(act)
            means = {pair: mean for pair, mean in means.items() if act not in pair}
        else:
            prefill, decode, byte_s = act
            bandwidths.learn(prefill, decode, byte_s)
            means.setdefault((prefill, decode), RobustMean(usual.value)).learn(byte_s)
            usual.learn(byte_s)

    everybody = [f"w{number}" for number in range(7)]
    matrix = bandwidths.bytes_s(everybody, everybody[::-1])
    assert bandwidths.usual_s == usual.value
    assert {(one, other): byte_s for one, other, byte_s in bandwidths} == {p: m.value for p, m in means.items()}
    assert bool(bandwidths) == bool(means)
    for row, prefill in enumerate(everybody):
        for column, decode in enumerate(everybody[::-1]):
            expected = means.get((prefill, decode), usual).value
            assert matrix[row, column] == bandwidths.byte_s(prefill, decode) == expected
