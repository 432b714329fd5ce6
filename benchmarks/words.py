"""Prompts of a wanted length, made up from a seed: the benchmarks carry no text of anybody's."""

from __future__ import annotations

import random

WORDS = [
    "river",
    "stone",
    "lamp",
    "morning",
    "garden",
    "copper",
    "letter",
    "window",
    "harbour",
    "bridge",
    "winter",
    "engine",
    "paper",
    "silver",
    "forest",
    "teacher",
    "market",
    "bottle",
    "mirror",
    "thunder",
    "candle",
    "anchor",
    "basket",
    "feather",
    "ladder",
    "meadow",
    "needle",
    "orchard",
    "pepper",
    "quarry",
    "ribbon",
    "saddle",
]
"""Common words: about one token each with a leading space."""


def sentence(seed: int, words: int) -> str:
    """`words` words; equal seeds give equal beginnings."""
    chooser = random.Random(seed)
    return " ".join(chooser.choice(WORDS) for _ in range(words))
