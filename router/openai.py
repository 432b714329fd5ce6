"""What the router reads of an OpenAI request, and how it adds to one.

The client's body is never written anew: our fields are put in front of its last brace,
and every other byte stays. The engine's parser (Python's json, under FastAPI, and ours in
front of it) takes the last of equal keys, so what we add also replaces.

    {"model": "m", "messages": [...], "stream": true}
    {"model": "m", "messages": [...], "stream": true,"input_ids":[...],"rid":"…","bootstrap_room":7,"stream":false}

Mistakes that the router can see are answered here, in OpenAI's shape; the engine says
the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import xxhash

from router.messages import Json
from transfer.wire import bound_host

MAX_BODY_BYTES = 32 * 1024 * 1024
"""A body longer than this is refused."""
MAX_BATCH = 1024
"""Prompts in one completion request. Each takes a room of its own, counted up from the first."""
MAX_ROOM = 2**63 - 1 - MAX_BATCH

_OURS = ("bootstrap_host", "bootstrap_port", "bootstrap_room", "rid", "input_ids")
_RANKS = ("routed_dp_rank", "disagg_prefill_dp_rank", "data_parallel_rank")


_Token = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class Endpoint(StrEnum):
    """The two that are routed, by their path."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class ApiError(Exception):
    """Something the client is told, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str = "",
        code: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param or None
        self.code = code or None
        self.headers = {} if retry_after_s is None else {"retry-after": str(max(1, math.ceil(retry_after_s)))}

    def body(self) -> bytes:
        """{"error": {"message", "type", "param", "code"}}"""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")

    def event(self) -> bytes:
        """The same as an event of a stream that has begun."""
        return b"data: " + self.body() + b"\n\n"


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """A request whose shape was checked."""

    endpoint: Endpoint
    raw: bytes = field(repr=False)
    """The body as it came, without space around it."""
    body: Json = field(repr=False)
    stream: bool
    salt: str = field(repr=False)
    """Namespace of its pages, as the engine forms it; "" for none."""
    session: str = field(repr=False)
    """What the client says that it belongs to: for policies that keep sessions together; "" where it says nothing."""
    max_new_tokens: int | None
    """What the client asked for; None: as many as fit."""
    limit_field: str = "max_tokens"
    """Where it stands, or would."""
    may_resume: bool = True
    """Whether the client allows that a stream goes on elsewhere."""


@dataclass(frozen=True, slots=True)
class Handoff:
    """Where the two legs of a request meet."""

    host: str
    port: int
    room: int
    epoch: int
    """The life of the prefill worker that it is meant for: another one does not know of it, and shall say so."""


def read(endpoint: Endpoint, raw: bytes, model: str, *, may_resume: bool = True) -> ClientRequest:
    """Checks what both the router and the engine rely on.

    model       the only name that is served
    may_resume  whether the client allows that a stream goes on elsewhere

    Raises ApiError.
    """
    body = _object(raw)
    _check_model(body, model)
    if endpoint is Endpoint.CHAT:
        _check_messages(body)
    else:
        _check_prompt(body)
    for name in _OURS:
        if body.get(name) is not None:
            raise ApiError(400, f"{name}: set by the router, so a client may not send it", param=name)
    for name in _RANKS:
        if body.get(name) is not None:
            raise ApiError(400, f"{name}: the router chooses the worker, so a client may not send it", param=name)
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise _wrong("stream", "true or false", stream)
    if _count(body, "n") not in (None, 1):
        raise ApiError(
            400,
            "n: wanted 1, as a prompt is handed over to one continuation; send the request again instead",
            param="n",
        )
    names = ("max_completion_tokens", "max_tokens") if endpoint is Endpoint.CHAT else ("max_tokens",)
    limits = {name: limit for name in names if (limit := _count(body, name)) is not None}
    default = None if endpoint is Endpoint.CHAT else 16
    return ClientRequest(
        endpoint=endpoint,
        raw=raw.strip(),
        body=body,
        stream=stream,
        salt=_salt(body),
        session=_session(body),
        max_new_tokens=next(iter(limits.values()), default),
        limit_field=next(iter(limits), "max_tokens"),
        may_resume=may_resume,
    )


def _session(body: Json) -> str:
    """A hash of what the client says, in OpenAI's own fields: that may be long, and is not ours to keep.

    What is no text is the engine's to refuse.
    """
    named = body.get("prompt_cache_key") or body.get("user")
    if not isinstance(named, str) or not named:
        return ""
    return xxhash.xxh3_64_hexdigest(named.encode(errors="surrogatepass"))


def check_length(request: ClientRequest, prompt_tokens: int, context_tokens: int) -> None:
    """Refuses what cannot fit, as the engine would, with the numbers. Raises ApiError."""
    param = "messages" if request.endpoint is Endpoint.CHAT else "prompt"
    if prompt_tokens >= context_tokens:
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens, and this model's context is {context_tokens}",
            param=param,
            code="context_length_exceeded",
        )
    wanted = request.max_new_tokens
    if wanted is not None and prompt_tokens + wanted > context_tokens:
        raise ApiError(
            400,
            f"{prompt_tokens} tokens of prompt and {wanted} of completion are {prompt_tokens + wanted}, "
            f"and this model's context is {context_tokens}",
            param=param,
            code="context_length_exceeded",
        )


def leg_body(
    request: ClientRequest,
    rid: str,
    ids: list[int] | None,
    handoff: Handoff | None,
    more: Mapping[str, Any] = MappingProxyType({}),
    *,
    keep_stream: bool,
) -> bytes:
    """The body for one worker: the client's bytes and our fields.

    ids          tokens of the prompt; None: the engine renders it itself
    handoff      None for a worker that decodes what it prefills
    more         further fields, which replace the client's
    keep_stream  False: answered in one piece, whatever the client wants
    """
    ours: Json = {**more}
    if ids is not None and ids is not request.body.get("prompt"):
        # Else they stand in the client's own body already: to read them twice would take the engine twice as long.
        ours["input_ids" if request.endpoint is Endpoint.CHAT else "prompt"] = ids
    ours["rid"] = rid
    if handoff is not None:
        ours |= {
            "bootstrap_host": bound_host(handoff.host, handoff.epoch),
            "bootstrap_port": handoff.port,
            "bootstrap_room": handoff.room,
        }
    if (request.stream and not keep_stream) or request.body.get("stream", False) is None:
        # OpenAI lets it be null, the engine does not.
        ours["stream"] = False
    return request.raw[:-1] + b"," + msgspec.json.encode(ours)[1:]


def engine_rids(request: ClientRequest, rid: str) -> list[str]:
    """The names by which the engine knows the request, which an abort has to give.

    It names each prompt of a batch anew, even of a batch of one (SGLang 0.5.16, `io_struct.py`, `_normalize_rid`).
    """
    prompt = request.body.get("prompt") if request.endpoint is Endpoint.COMPLETIONS else None
    if isinstance(prompt, list) and type(prompt[0]) is not int:
        return [f"{rid}_{number}" for number in range(len(prompt))]
    return [rid]


def _object(raw: bytes) -> Json:
    if len(raw) > MAX_BODY_BYTES:
        raise ApiError(413, f"body: wanted at most {MAX_BODY_BYTES} bytes, found {len(raw)}")
    try:
        body = _parsed(raw)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"body: wanted JSON in UTF-8, found something else{where}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"body: wanted a JSON object, found {_kind(body)}")
    return body


def _parsed(raw: bytes) -> Any:
    """What the engine's parser, Python's, makes of it. Raises ValueError, RecursionError."""
    try:
        # Several times as quick, and it takes nothing that Python's would not take, or take otherwise.
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Python's also takes NaN, numbers beyond a double's, and half a surrogate pair. As text: from bytes it would
        # take UTF-16 as well, into which nothing can be put.
        return json.loads(raw.decode("utf-8"))


def _check_model(body: Json, model: str) -> None:
    wanted = body.get("model")
    if wanted is None:
        raise ApiError(400, "model: wanted the name of a model, found none", param="model")
    if not isinstance(wanted, str):
        raise _wrong("model", "text", wanted)
    if wanted != model:
        raise ApiError(
            404,
            f"model: wanted {model!r}, found {wanted[:200]!r}",
            param="model",
            code="model_not_found",
        )


def _check_messages(body: Json) -> None:
    messages = body.get("messages")
    if messages is None:
        raise ApiError(400, "messages: wanted a list of messages, found none", param="messages")
    if not isinstance(messages, list):
        raise _wrong("messages", "a list", messages)
    if not messages:
        raise ApiError(400, "messages: wanted at least one, found an empty list", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong(f"messages[{index}]", "an object", message)


def _check_prompt(body: Json) -> None:
    prompt = body.get("prompt")
    if prompt is None:
        raise ApiError(400, "prompt: wanted text or token ids, found none", param="prompt")
    if not isinstance(prompt, str | list):
        raise _wrong("prompt", "text or a list", prompt)
    if not prompt:
        raise ApiError(400, "prompt: wanted at least one token, found nothing", param="prompt")
    if isinstance(prompt, str):
        return
    first = prompt[0]
    if type(first) is int:
        if not _are_tokens(prompt):
            raise ApiError(400, "prompt: wanted token ids in [0, 2^32), found something else", param="prompt")
    elif len(prompt) > MAX_BATCH:
        raise ApiError(400, f"prompt: wanted at most {MAX_BATCH} prompts, found {len(prompt)}", param="prompt")
    elif not all(isinstance(one, type(first)) and isinstance(one, str | list) for one in prompt):
        raise ApiError(400, "prompt: wanted texts, or lists of token ids, found a mixture", param="prompt")


def _are_tokens(prompt: list[Any]) -> bool:
    """Checked in C: a prompt may have a hundred thousand."""
    try:
        msgspec.convert(prompt, list[_Token])
    except msgspec.ValidationError:
        return False
    return True


def _count(body: Json, name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int:
        raise _wrong(name, "a whole number", value)
    if value < 1:
        raise ApiError(400, f"{name}: wanted at least 1, found {value}", param=name)
    return value


def _salt(body: Json) -> str:
    """As SGLang 0.5.16 forms it (`serving_base.py`, `_compute_extra_key`)."""
    parts = []
    for name in ("cache_salt", "extra_key"):
        value = body.get(name)
        if not value:
            continue
        if not isinstance(value, str):
            raise _wrong(name, "text", value)
        if "\0" in value:
            raise ApiError(400, f"{name}: wanted text without NUL", param=name)
        if not _is_utf8(value):
            raise ApiError(400, f"{name}: wanted text in UTF-8, found half a surrogate pair", param=name)
        parts.append(value)
    return "".join(parts)


def _is_utf8(text: str) -> bool:
    """Whether it can be written in UTF-8: JSON may escape half a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong(name: str, wanted: str, found: Any) -> ApiError:
    return ApiError(400, f"{name}: wanted {wanted}, found {_kind(found)}", param=name)


def _kind(value: Any) -> str:
    """What JSON calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
