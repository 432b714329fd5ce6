"""Bring messages and tools into the shape in which the engine hands them to a chat template.

The engine checks a request with its own models and dumps them again: fields get an
order, unknown ones go, absent ones of tools appear as null, and a template that prints
them as JSON sees all that. This is the same for the shapes that a text model takes.
Whatever has another shape is not guessed at: it is Unrenderable, and the engine, which
gets the body as it came, says what is wrong with it or knows how to read it.

Source: SGLang 0.5.16, `srt/entrypoints/openai/protocol.py`, `serving_chat.py`,
`srt/parser/jinja_template_utils.py`, `srt/function_call/utils.py`.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import msgspec

from router.template import ContentFormat
from transfer.undecodable import UNDECODABLE

Json = dict[str, Any]

GENERIC_ROLES: Final = ("system", "assistant", "tool", "function", "developer", "latest_reminder")
MEDIA: Final = ("image_url", "video_url", "audio_url", "input_audio", "tool_reference")
EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Unrenderable(Exception):
    """The router cannot tell which tokens the engine makes of this request. The message is the reason."""


def chat_messages(body: Json, form: ContentFormat) -> list[Json]:
    """The messages as a template gets them, before the last one is looked at."""
    return [_for_template(_checked_message(message), form) for message in body["messages"]]


def split_last(messages: list[Json], continue_final: bool) -> tuple[list[Json], str]:
    """Messages for the template, and the text that the answer goes on from ("" where there is none).

    A last message of the assistant is either continued, or, as the engine does it, said by the user.
    """
    last = messages[-1]
    if last["role"] != "assistant" or not isinstance(last["content"], str):
        return messages, ""
    if continue_final:
        return messages[:-1], last["content"]
    return [*messages[:-1], {"role": "user", "content": last["content"]}], ""


def chat_tools(body: Json) -> list[Json] | None:
    """The tools as a template gets them; None where there are none to use."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if not tools or choice == "none":
        return None
    if not isinstance(tools, list):
        raise Unrenderable("tools: not a list")
    checked = [_checked_tool(tool) for tool in tools]
    if isinstance(choice, dict):
        function = choice.get("function")
        wanted = function.get("name") if isinstance(function, dict) else None
        return [tool for tool in checked if tool["function"]["name"] == wanted]
    if choice not in (None, "auto", "required"):
        raise Unrenderable("tool_choice: unknown")
    return checked


def template_arguments(body: Json) -> Json:
    """`chat_template_kwargs` with what `reasoning` and `reasoning_effort` add to them."""
    given = body.get("chat_template_kwargs")
    if given is not None and not isinstance(given, dict):
        raise Unrenderable("chat_template_kwargs: not an object")
    arguments: Json = dict(given or {})
    effort = _effort(body.get("reasoning_effort"))
    thinking: bool | None = None
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict):
        inner = reasoning.get("effort")
        inner = reasoning.get("reasoning_effort") if inner is None else inner
        effort = effort if inner is None else _effort(inner)
        thinking = True if _enabled(reasoning) else None
    if effort is not None:
        thinking = effort != "none"
    if thinking is not None:
        arguments.setdefault("thinking", thinking)
        arguments.setdefault("enable_thinking", thinking)
    if arguments.get("reasoning_effort") is None:
        arguments.pop("reasoning_effort", None)
        if effort is not None:
            arguments["reasoning_effort"] = effort
    return arguments


def _effort(value: Any) -> str | float | None:
    if value is None or value in EFFORTS:
        return value  # type: ignore[no-any-return]
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 0.99:
        return float(value)
    raise Unrenderable("reasoning_effort: neither a level nor a number in [0, 0.99]")


def _enabled(reasoning: Json) -> bool:
    enabled = reasoning.get("enabled")
    enabled = reasoning.get("enable", False) if enabled is None else enabled
    if isinstance(enabled, str):
        return enabled.strip().lower() in {"1", "true", "yes", "y", "on"}
    return bool(enabled)


def _checked_message(message: Any) -> Json:
    """The engine's dump of one message, without the fields that are null."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Unrenderable("messages: not objects with a role")
    role = message["role"]
    content = message.get("content")
    if role == "user":
        if content is None:
            raise Unrenderable("messages: a user message without content")
        return {"role": role, "content": _checked_content(content, role)}
    role = role.lower()
    if role not in GENERIC_ROLES:
        raise Unrenderable(f"messages: unknown role of {len(role)} characters")
    checked: Json = {"role": role, "content": "" if content is None else _checked_content(content, role)}
    for key in ("tool_call_id", "name", "reasoning_content"):
        value = message.get(key)
        if value is not None and not isinstance(value, str):
            raise Unrenderable(f"messages: {key} is not text")
        checked[key] = value
    calls, tools = message.get("tool_calls"), message.get("tools")
    checked["tool_calls"] = (
        None if calls is None else [_checked_call(call, role) for call in _list(calls, "tool_calls")]
    )
    checked["tools"] = None if tools is None else [_checked_tool(tool) for tool in _list(tools, "tools")]
    return {key: value for key, value in checked.items() if value is not None}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unrenderable(f"messages: {name} is not a list")
    return value


def _checked_content(content: Any, role: str) -> str | list[Json]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unrenderable("messages: content is neither text nor a list of parts")
    parts: list[Json] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("thinking", "reasoning") and role == "assistant":
            if not isinstance(part.get("thinking"), str) ^ isinstance(part.get("text"), str):
                raise Unrenderable("messages: a thinking part without its text")
            # Checked, and then no template sees it.
        else:
            # The name is the client's text, so only known ones are repeated.
            raise Unrenderable(f"content part: {kind if kind in MEDIA else 'unknown'}")
    return parts


def _checked_call(call: Any, role: str) -> Json:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise Unrenderable("messages: a tool call without a function")
    identity, index, name = call.get("id"), call.get("index"), function.get("name")
    if not (isinstance(identity, str | None) and isinstance(name, str | None)):
        raise Unrenderable("messages: a tool call whose id or name is not text")
    if index is not None and type(index) is not int:
        raise Unrenderable("messages: a tool call whose index is not a number")
    return {
        "id": identity,
        "index": index,
        "type": "function",
        "function": {"name": name, "arguments": _arguments(function.get("arguments"), role)},
    }


def _arguments(given: Any, role: str) -> Any:
    if given is None or isinstance(given, dict):
        return given
    if not isinstance(given, str):
        raise Unrenderable("messages: tool call arguments are neither text nor an object")
    if role != "assistant":
        return given
    try:
        parsed = msgspec.json.decode(given)
    except (*UNDECODABLE, UnicodeEncodeError):
        raise Unrenderable("messages: tool call arguments are not JSON") from None
    if not isinstance(parsed, dict):
        raise Unrenderable("messages: tool call arguments are not an object")
    return parsed


def _for_template(message: Json, form: ContentFormat) -> Json:
    """One message with its parts joined, or kept where the template goes through them itself."""
    content = message["content"]
    if isinstance(content, str):
        return message
    joined = " ".join(part["text"] for part in content)
    if form == "string":
        return {**message, "content": joined}
    # The engine builds the message anew here, with its content last.
    rest = {key: value for key, value in message.items() if key != "content"}
    return {**rest, "content": joined if message["role"] == "tool" else content}


def _checked_tool(tool: Any) -> Json:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unrenderable("tools: a tool without a named function")
    kind, strict, description = tool.get("type", "function"), function.get("strict", False), function.get("description")
    deferred, inner = tool.get("defer_loading"), function.get("defer_loading")
    if not isinstance(kind, str) or not isinstance(strict, bool) or not isinstance(description, str | None):
        raise Unrenderable("tools: a tool whose type, strict or description is of the wrong type")
    if not isinstance(deferred, bool | None) or not isinstance(inner, bool | None):
        raise Unrenderable("tools: defer_loading is not a boolean")
    parameters = copy.deepcopy(function.get("parameters"))
    normalize_types(parameters)
    checked: Json = {
        "description": description,
        "name": function["name"],
        "parameters": parameters,
        "strict": strict,
    }
    inner = deferred if inner is None else inner
    if inner is not None:
        checked["defer_loading"] = inner
    return {"type": kind, "function": checked, "defer_loading": deferred}


_STANDARD = frozenset({"null", "boolean", "object", "array", "number", "string", "integer"})
_ALIASES: Final = {
    "string": "str text varchar char enum uuid date datetime time timestamp binary blob bytea bytes varbinary",
    "boolean": "bool",
    "integer": "bigint smallint tinyint",
    "number": "double decimal real numeric",
    "array": "arr tuple set",
    "object": "map",
}
_ALIAS: Final = {alias: name for name, aliases in _ALIASES.items() for alias in aliases.split()}
_PREFIXES: Final = (
    (("int", "uint", "long", "short", "unsigned"), "integer"),
    (("num", "float"), "number"),
    (("list",), "array"),
    (("dict",), "object"),
)
_AFTER_PREFIX = frozenset("0123456789[<( \t")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_DIRECT = (
    "items",
    "additionalProperties",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
)


def normalize_types(schema: Any) -> None:
    """Rewrites, in place, types that databases and programs call otherwise ("varchar", "int32") to JSON Schema's."""
    if isinstance(schema, list):
        for item in schema:
            normalize_types(item)
    if not isinstance(schema, dict):
        return
    kind = schema.get("type")
    if isinstance(kind, str):
        schema["type"] = _standard_type(kind)
    elif isinstance(kind, list):
        schema["type"] = _without_repeats([_standard_type(item) for item in kind])
    for key in _BY_NAME:
        if isinstance(schema.get(key), dict):
            for item in schema[key].values():
                normalize_types(item)
    for key in _IN_LISTS:
        if isinstance(schema.get(key), list):
            normalize_types(schema[key])
    for key in _DIRECT:
        normalize_types(schema.get(key))


def _standard_type(name: Any) -> Any:
    if not isinstance(name, str) or name in _STANDARD:
        return name
    base = name.split("(", 1)[0].strip().lower()
    if base in _STANDARD:
        return base
    if base in _ALIAS:
        return _ALIAS[base]
    for prefixes, standard in _PREFIXES:
        for prefix in prefixes:
            if base.startswith(prefix) and (base == prefix or base[len(prefix)] in _AFTER_PREFIX):
                return standard
    return name


def _without_repeats(items: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return kept
