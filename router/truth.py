"""Whether an answer's own sums add up: an engine that computed another prompt, or stopped short, says so in them."""

from __future__ import annotations

from collections.abc import Sequence

from router.answer import Usage


def untrue(
    usage: Usage | None,
    ids: Sequence[int] | None,
    finish_reason: str | None = None,
    max_new_tokens: int | None = None,
    sure_new_tokens: int | None = None,
) -> str:
    """What does not add up, in a few words after the worker's name; "" where all does, or nothing is said.

    ids             the prompt that was sent; None: it was rendered by the engine
    max_new_tokens  what was asked for; None: as many as fit
    sure_new_tokens of these, so many fit for sure: an engine may end earlier for its length near its limits
    """
    if usage is None:
        return ""
    if ids is not None and usage.prompt_tokens not in (0, len(ids)):
        return f"computed {usage.prompt_tokens} tokens of a prompt of {len(ids)}"
    if max_new_tokens is None:
        return ""
    if usage.completion_tokens > max_new_tokens:
        return f"made {usage.completion_tokens} tokens where at most {max_new_tokens} were asked for"
    sure = max_new_tokens if sure_new_tokens is None else min(max_new_tokens, sure_new_tokens)
    if finish_reason == "length" and usage.completion_tokens < sure:
        return f"ended for its length after {usage.completion_tokens} of {max_new_tokens} tokens"
    return ""
