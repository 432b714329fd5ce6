"""Run a chat template exactly as the engine's tokenizer library does.

The environment is that of transformers 5.12 (`utils/chat_template_utils.py`): a
sandbox, blocks trimmed, loop controls, a `tojson` that keeps the order and escapes no
HTML, `raise_exception`, `strftime_now`, and the `generation` tag, which only marks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

ContentFormat = Literal["string", "openai"]
"""Whether a template wants a message's text, or its list of parts."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` renders what is in it."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


def environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """What templates are compiled in; `now` is what they see as the time of day."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: now().strftime(form)
    return made


def content_format(template: str, environment: ImmutableSandboxedEnvironment) -> ContentFormat:
    """The engine's guess, which decides what the template is given.

    Source: SGLang 0.5.16, `srt/parser/jinja_template_utils.py`.
    """
    if any(word in template for word in ("image", "audio", "video", "vision")):
        return "openai"
    try:
        tree = environment.parse(template)
    except jinja2.TemplateError:
        return "string"
    for loop in tree.find_all(nodes.For):
        if any(_reads(loop.iter, name, "content") for name in ("message", "msg", "m")):
            return "openai"
    return "string"


def _reads(node: nodes.Node, name: str, key: str) -> bool:
    """Whether `node` is name[key] or name.key, perhaps filtered, tested or sliced."""
    if isinstance(node, nodes.Filter):
        return node.node is not None and _reads(node.node, name, key)
    if isinstance(node, nodes.Test):
        return _reads(node.node, name, key)
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            return _reads(node.node, name, key)
        return _is(node.node, name) and isinstance(node.arg, nodes.Const) and bool(node.arg.value == key)
    return isinstance(node, nodes.Getattr) and _is(node.node, name) and node.attr == key


def _is(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
