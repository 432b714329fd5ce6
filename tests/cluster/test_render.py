"""The router renders and tokenizes exactly as the engine does: asked of the engine's own endpoint."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.client import post_json
from benchmarks.words import sentence
from engine.launch.cluster import Cluster
from router.render import Rendered, Renderer

CHATS = 60
COMPLETIONS = 20
ODD_TEXTS = (
    "",
    " ",
    "  leading and trailing  ",
    "line\nbreaks\n\n",
    "tabs\tand\r\nreturns",
    "Grüße aus Zürich — ça va? 你好世界 🌊🚢",
    "<|im_start|>system\nnot a system prompt<|im_end|>",
    "<|endoftext|>",
    "{{ messages }} {% raw %}",
    '{"json": [1, 2, {"a": null}]}',
    "def f(x):\n    return x  # comment",
    "0123456789 3.14159 1e-9 0xFF",
    "a" * 300,
)


def chat_of(chooser: random.Random) -> dict[str, Any]:
    """Roles in and out of order, plain and listed contents, with and without what a body may add."""

    def content() -> Any:
        text = chooser.choice(ODD_TEXTS) if chooser.random() < 0.5 else sentence(chooser.getrandbits(20), 12)
        return [{"type": "text", "text": text}] if chooser.random() < 0.25 else text

    messages: list[dict[str, Any]] = []
    if chooser.random() < 0.5:
        messages.append({"role": "system", "content": content()})
    for _ in range(chooser.randint(1, 4)):
        messages.append({"role": "user", "content": content()})
        messages.append({"role": "assistant", "content": content()})
    body: dict[str, Any] = {"messages": messages}
    if chooser.random() < 0.7:
        messages.pop()
    elif chooser.random() < 0.5:
        body["continue_final_message"] = True
    if chooser.random() < 0.2:
        body["chat_template_kwargs"] = {"unknown_switch": True}
    return body


def engine_ids(cluster: Cluster, body: dict[str, Any]) -> list[int]:
    worker = cluster.plan.workers[0]
    answer = post_json(f"http://{worker.host}:{worker.port}", "/v1/tokenize", {"model": worker.served_model, **body})
    ids: list[int] = answer["tokens"]
    return ids


def test_chats(live: Cluster) -> None:
    renderer = Renderer.load(live.plan.router.model_path)
    chooser = random.Random(5)
    bodies = [chat_of(chooser) for _ in range(CHATS)]

    wrong = [body for body in bodies if renderer.chat(body) != Rendered(engine_ids(live, body))]

    assert wrong == []
    assert len({str(body) for body in bodies}) >= 50


def test_completions(live: Cluster) -> None:
    renderer = Renderer.load(live.plan.router.model_path)
    prompts = [text for text in ODD_TEXTS if text] + [sentence(number, 30) for number in range(COMPLETIONS)]

    wrong = [
        prompt
        for prompt in prompts
        if renderer.completion({"prompt": prompt}) != Rendered(engine_ids(live, {"prompt": prompt}))
    ]

    assert wrong == []
