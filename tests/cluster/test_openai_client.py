"""The official client, unmodified."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from engine.launch.cluster import Cluster


@pytest.fixture
def client(live: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def model(live: Cluster) -> str:
    return live.plan.router.model


QUESTION = "What is the capital of France?"


def test_models(client: openai.OpenAI, model: str) -> None:
    assert [one.id for one in client.models.list()] == [model]


def test_chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=16, temperature=0
    )

    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 10


def test_chat_streamed(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=16, temperature=0, stream=True
    ) as stream:
        chunks = list(stream)

    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(chunks) > 3
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_completion(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt="One, two, three,", max_tokens=8, temperature=0)

    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert "four" in answer.choices[0].text


def test_completion_streamed(client: openai.OpenAI, model: str) -> None:
    with client.completions.create(
        model=model,
        prompt="One, two, three,",
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)

    assert "four" in "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_invalid_requests_raise_the_clients_own_exceptions(client: openai.OpenAI, model: str) -> None:
    hello = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.chat.completions.create(model="no-such-model", messages=hello)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model=model, messages="hello")  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.completions.create(model=model, prompt=[5] * 9000, max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=model, prompt="hello", max_tokens=1, temperature=-1)


def test_several_choices_are_refused_as_one_prompt_is_handed_over_to_one_continuation(
    client: openai.OpenAI, model: str
) -> None:
    with pytest.raises(openai.BadRequestError, match="n: wanted 1"):
        client.completions.create(model=model, prompt="One, two,", max_tokens=4, n=2)
