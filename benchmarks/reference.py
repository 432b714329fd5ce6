"""Outputs to compare with: what one undisturbed SGLang says, at temperature 0.

Where the two best tokens are closer than 1e-3 at any compared position, float arithmetic may
rightly choose either, so such a prompt is replaced before anything is compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.client import post_json

OUTPUT_TOKENS = 32
NEAR_TIE = 1e-3
VOCABULARY = range(1000, 20000)
"""Ordinary tokens of SmolLM2: no special ones."""
ATTEMPTS = 10


@dataclass(frozen=True)
class Reference:
    prompt: list[int]
    tokens: list[str]
    """As the engine spells them, one for each output token."""
    text: str


def prompt_of(length: int, seed: int) -> list[int]:
    """Words at random, then a stretch of them again: attention has something to find."""
    chooser = random.Random(seed)
    half = [chooser.choice(VOCABULARY) for _ in range(length - length // 3)]
    return half + half[: length // 3]


def generate(url: str, model: str, prompt: list[int], timeout_s: float = 300.0) -> dict[str, Any]:
    """A completion of OUTPUT_TOKENS tokens with log-probabilities. Raises OSError, ValueError."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 2,
    }
    choice: dict[str, Any] = post_json(url, "/v1/completions", body, timeout_s)["choices"][0]
    return choice


def smallest_gap(choice: dict[str, Any]) -> float:
    """The smallest distance between the two best tokens' log-probabilities, over all positions."""
    best = [sorted(position.values(), reverse=True) for position in choice["logprobs"]["top_logprobs"]]
    return min((values[0] - values[1] for values in best if len(values) > 1), default=0.0)


def find_references(url: str, model: str, lengths: Sequence[int]) -> tuple[list[Reference], int]:
    """A reference for each length, in tokens, and how many near ties were replaced."""
    found: list[Reference] = []
    replaced = 0
    for number, length in enumerate(lengths):
        for attempt in range(ATTEMPTS):
            prompt = prompt_of(length, seed=1000 * number + attempt)
            choice = generate(url, model, prompt)
            if smallest_gap(choice) >= NEAR_TIE:
                break
            replaced += 1
        found.append(Reference(prompt, choice["logprobs"]["tokens"], choice["text"]))
    return found, replaced
