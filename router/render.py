"""Turn a request into the tokens that the engine would make of it, without the engine.

    body ── messages ──> template (jinja2) ──> text ──> tokenizer.json ──> ids

The ids decide where the request goes and then go with it, so that it is tokenized once.
They have to be the engine's own: one token off, and every page after it has another
name. What cannot be rendered with certainty is `Unrenderable`: its body passes as it
came, and is routed by load.

Chat: the template writes the special tokens, the tokenizer adds none. Completions: the
tokenizer adds those that the model's post-processor asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import jinja2
from tokenizers import AddedToken, Tokenizer  # type: ignore[import-untyped]
from tokenizers.processors import TemplateProcessing  # type: ignore[import-untyped]

from router.messages import (
    Json,
    Unrenderable,
    chat_messages,
    chat_tools,
    split_last,
    template_arguments,
)
from router.template import content_format, environment

NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_RESERVED: Final = frozenset(
    {
        "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
        "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
        "return_assistant_tokens_mask", "messages",
    }
)  # fmt: skip
"""Names in `chat_template_kwargs` that are arguments of the tokenizer's own method and do not reach the template."""

_OWN_ENCODER: Final = ("DeepseekV4", "InklingForConditionalGeneration")
"""Architectures whose chats the engine encodes in Python, whatever template they carry."""

_BUILT_IN_TYPES: Final = frozenset(
    {
        "internvl_chat", "deepseek_vl_v2", "multi_modality", "phi4mm", "minicpmv", "minicpmo", "moss_vl",
        "deepseek-ocr", "unlimited-ocr", "paddleocr_vl", "whisper",
    }
)  # fmt: skip
_BUILT_IN_PATHS: Final = re.compile(
    r"\bpoints\b|moss.*vl|internvl|janus|vicuna|llava-v1\.[56]|llava-next-video|llava-onevision-qwen2|deepseek.*vl2"
    r"|minicpm-[vo]|phi-4-multimodal|deepseek-ocr|unlimited|paddleocr|whisper",
    re.IGNORECASE,
)
"""Folders and model types for which the engine prefers a template of its own over the model's."""

_FLAGGED_CLASSES: Final = frozenset(
    {
        "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast",
        "GemmaTokenizer", "GemmaTokenizerFast", "CohereTokenizerFast",
    }
)  # fmt: skip
"""Tokenizer classes for which the engine follows `add_bos_token` and not the post-processor in tokenizer.json."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as the engine will see it."""

    ids: list[int]


class Renderer:
    """Renders for one model.

    tokenizer  with special tokens known and no truncation
    template   chat template; None: chats are Unrenderable, for the reason `no_chat`
    named      special tokens by name ("bos_token"), as templates see them
    now        what templates see as the time of day
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        named: dict[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
        no_chat: str = "the model has no chat template",
    ) -> None:
        self._tokenizer = tokenizer
        self._named = named
        self._no_chat = no_chat
        self._bos_id = tokenizer.token_to_id(named["bos_token"]) if "bos_token" in named else None
        compiler = environment(now)
        self._template_text = template or ""
        self._template = None if template is None else compiler.from_string(template)
        self._format = content_format(self._template_text, compiler)

    @classmethod
    def load(cls, folder: Path, *, now: Callable[[], datetime] = datetime.now) -> Renderer:
        """Reads tokenizer.json, tokenizer_config.json and the chat template of a checkpoint.

        Raises OSError where a file cannot be read, ValueError where it cannot be understood.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: wanted a checkpoint with a tokenizer.json, found none")
        config = _read(folder / "tokenizer_config.json")
        named = _named_tokens(folder, config)
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_tokens(tokenizer, config, named)
        _set_bos(tokenizer, config, named)
        template, reason = _chat_template(folder, config)
        plain = {name: token.content for name, token in named.items()}
        return cls(tokenizer, template, plain, now=now, no_chat=reason)

    def text(self, ids: Sequence[int]) -> str:
        """What these tokens say."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def chat(self, body: Json) -> Rendered:
        """The prompt of a chat request. Raises Unrenderable."""
        if self._template is None:
            raise Unrenderable(self._no_chat)
        _check_shared(body)
        messages, prefix = split_last(chat_messages(body, self._format), body.get("continue_final_message") is True)
        if not messages:
            raise Unrenderable("messages: nothing before the message to continue")
        arguments = self._checked_arguments(template_arguments(body))
        tools = chat_tools(body)
        try:
            text = self._run(self._template, messages, tools, arguments)
        except Exception:  # a template is a program: whatever it raises, the engine tries the other form of tools
            bare = [tool["function"] for tool in tools] if tools else None
            try:
                text = self._run(self._template, messages, bare, arguments)
            except Exception as error:
                raise Unrenderable(f"the chat template refused it ({type(error).__name__})") from None
        ids = self._encode(text, special=False)
        if prefix:
            continued = self._encode(prefix, special=True)
            ids += continued[1:] if continued and continued[0] == self._bos_id else continued
        return Rendered(ids)

    def completion(self, body: Json) -> Rendered:
        """The prompt of a completion request: one text, or one list of ids, which is returned as it is.

        The ids are taken for ids (router.openai.read checks them). Raises Unrenderable.
        """
        _check_shared(body)
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return Rendered(self._encode(prompt, special=True))
        if isinstance(prompt, list) and prompt and type(prompt[0]) is int:
            return Rendered(prompt)
        raise Unrenderable("a batch of prompts")

    def _checked_arguments(self, arguments: Json) -> Json:
        taken = sorted(_RESERVED & arguments.keys())
        if taken:
            raise Unrenderable(f"chat_template_kwargs: {taken[0]} does not reach the template")
        if arguments.get("reasoning_effort") == "low" and "low_effort" in self._template_text:
            raise Unrenderable("reasoning_effort: the engine translates it for this template")
        return arguments

    def _run(
        self, template: jinja2.Template, messages: Sequence[Json], tools: list[Json] | None, arguments: Json
    ) -> str:
        values = {**self._named, **arguments}
        return template.render(messages=messages, tools=tools, documents=None, add_generation_prompt=True, **values)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except TypeError:
            # What JSON may carry and UTF-8 may not.
            raise Unrenderable("text with half a surrogate pair") from None


def _check_shared(body: Json) -> None:
    if body.get("lora_path") is not None:
        # An adapter's pages are its own, and its name is not in the pages' namespace yet.
        raise Unrenderable("lora_path: adapters are not routed by prefix")


def _read(path: Path) -> Json:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: wanted JSON, found {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: wanted an object, found {type(value).__name__}")
    return value


def _token(value: Any) -> AddedToken | None:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {key: bool(value[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in value}
        return AddedToken(value["content"], special=True, **flags)
    return None


def _named_tokens(folder: Path, config: Json) -> dict[str, AddedToken]:
    values = dict(config)
    if "added_tokens_decoder" not in config:
        # Older checkpoints keep them in a file of their own.
        values.update(_read(folder / "special_tokens_map.json"))
    extra = values.get("extra_special_tokens")
    named: list[str] = [name for name in NAMED_TOKENS if name in values]
    named += [name for name in values if name.endswith("_token") and name not in NAMED_TOKENS]
    tokens = {name: _token(values[name]) for name in named}
    if isinstance(extra, dict):
        tokens |= {name: _token(value) for name, value in extra.items()}
    return {name: token for name, token in tokens.items() if token is not None}


def _add_tokens(tokenizer: Tokenizer, config: Json, named: dict[str, AddedToken]) -> None:
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for _, value in sorted(decoder.items(), key=lambda entry: int(entry[0])):
            if value["content"] not in known:
                tokenizer.add_tokens([AddedToken(**value)])
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens"))
    listed = [_token(value) for value in extra] if isinstance(extra, list) else []
    tokenizer.add_special_tokens([*named.values(), *(token for token in listed if token is not None)])


def _set_bos(tokenizer: Tokenizer, config: Json, named: dict[str, AddedToken]) -> None:
    if config.get("tokenizer_class") not in _FLAGGED_CLASSES or "bos_token" not in named:
        return
    wanted = config.get("add_bos_token")
    if wanted is None or wanted:
        bos = named["bos_token"].content
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    else:
        tokenizer.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])


def _chat_template(folder: Path, config: Json) -> tuple[str | None, str]:
    """The template that the engine would use, or None and why chats cannot be rendered."""
    model = _read(folder / "config.json")
    architectures = model.get("architectures") or [""]
    if any(name in architectures[0] for name in _OWN_ENCODER):
        return None, f"the engine encodes chats of {architectures[0]} by itself"
    if model.get("model_type") in _BUILT_IN_TYPES or _BUILT_IN_PATHS.search(str(folder)):
        return None, "the engine uses a built-in template for this model"
    file = folder / "chat_template.jinja"
    named = [{"name": "default", "template": file.read_text("utf-8")}] if file.is_file() else []
    others = folder / "additional_chat_templates"
    if others.is_dir():
        named += [{"name": path.stem, "template": path.read_text("utf-8")} for path in sorted(others.glob("*.jinja"))]
    template: Any = named or config.get("chat_template")
    if isinstance(template, list):
        # The engine takes the first of several.
        template = template[0].get("template") if template else None
    if not isinstance(template, str):
        return None, "the model has no chat template"
    try:
        environment(datetime.now).parse(template)
    except jinja2.TemplateError as error:
        return None, f"the chat template is not understood ({error})"
    return template, ""
