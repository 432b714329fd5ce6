"""Whether a stream that was cut off can go on with another pair of workers, and what they are asked then.

It goes on from the prompt and the tokens that the client has: the next token is computed from the same context, so at
temperature 0 the text is what it would have been. Where more than the context decides what comes next, or where
SGLang would see a request that it cannot tell from a new one, it does not go on.
"""

from __future__ import annotations

from router.messages import Json
from router.openai import ClientRequest, Endpoint
from router.token_stream import TokenStream

_DECIDING = (
    "tools",
    "functions",
    "response_format",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "custom_logit_processor",
    "session_params",
    "top_logprobs",
    "return_hidden_states",
    "return_routed_experts",
    "return_cached_tokens_details",
    "stop_regex",
)
"""Fields whose effect depends on where an answer began, or whose part of the answer would differ."""
_PENALTIES = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1}
"""Each counts the tokens generated so far, and what makes it do nothing."""


def forbids(request: ClientRequest) -> str:
    """Why this request cannot go on elsewhere, in a few words; "" where it can."""
    body = request.body
    if not request.stream:
        return "not a stream"
    if not request.may_resume:
        return "the client forbids it"
    if _is_batch(request):
        return "a batch"
    for name in _DECIDING:
        if body.get(name):
            return name
    logprobs = body.get("logprobs")
    if logprobs is not None and logprobs is not False:
        # Also 0: events have that of their own token then.
        return "logprobs"
    for name, nothing in _PENALTIES.items():
        if body.get(name) not in (None, nothing):
            return name
    return ""


def hinders(stream: TokenStream, stops: list[str], tail: str) -> str:
    """Why it cannot go on from here, in a few words; "" where it can.

    stops  the strings that end this request's answer
    tail   the last words of the text so far, longer than any of them
    """
    if not stream.exact:
        return "tokens unknown"
    if stream.reasoned:
        return "reasoning"
    if any(tail.endswith(stop[:length]) for stop in stops for length in range(1, len(stop))):
        return "stop string begun"
    return ""


def stop_strings(request: ClientRequest) -> list[str]:
    stop = request.body.get("stop")
    if isinstance(stop, str):
        return [stop]
    return [one for one in stop if isinstance(one, str)] if isinstance(stop, list) else []


def remaining(request: ClientRequest, generated_tokens: int) -> Json:
    """Fields that the request gets where so many of its tokens have been generated before. At least one is left."""
    left: Json = {}
    if request.max_new_tokens is not None:
        left[request.limit_field] = request.max_new_tokens - generated_tokens
    if type(request.body.get("min_tokens")) is int:
        left["min_tokens"] = max(0, request.body["min_tokens"] - generated_tokens)
    if request.body.get("echo"):
        # The client has the prompt already.
        left["echo"] = False
    return left


def _is_batch(request: ClientRequest) -> bool:
    prompt = request.body.get("prompt") if request.endpoint is Endpoint.COMPLETIONS else None
    return isinstance(prompt, list) and type(prompt[0]) is not int
