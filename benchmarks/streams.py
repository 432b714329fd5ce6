"""Many streamed requests at once, each with the time of every token: what their clients see."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

from benchmarks.legs import Pair

LIMIT_S = 120.0


@dataclass
class Stream:
    """One request. Times are seconds of `time.perf_counter`."""

    sent_s: float
    tokens_s: list[float] = field(default_factory=list)
    """When each token came."""
    error: str = ""
    wordless: int = 0
    """How many tokens came without text, as the first part of a character does."""

    @property
    def ttft_s(self) -> float | None:
        return self.tokens_s[0] - self.sent_s if self.tokens_s else None

    @property
    def itl_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.tokens_s)]


class Client:
    """Sends to a server that does all, a router or one worker; or to a pair, both legs by itself."""

    def __init__(self, session: aiohttp.ClientSession, target: str | Pair, model: str) -> None:
        self._session = session
        self._target = target
        self._model = model

    async def stream(self, prompt: Sequence[int], max_tokens: int) -> Stream:
        """A completion of exactly so many tokens at temperature 0, read to its end. Never raises: see `error`."""
        body: dict[str, Any] = {"model": self._model, "prompt": list(prompt), "max_tokens": max_tokens}
        body |= {"temperature": 0, "ignore_eos": True}
        if isinstance(self._target, str):
            return await self._read(self._target, body)
        body |= self._target.meeting()
        other_leg = asyncio.create_task(self._post(self._target.prefill_url, body))
        stream = await self._read(self._target.decode_url, body)
        stream.error = stream.error or await other_leg
        return stream

    async def _read(self, url: str, body: dict[str, Any]) -> Stream:
        stream = Stream(time.perf_counter())
        try:
            async with asyncio.timeout(LIMIT_S):
                async with self._session.post(f"{url}/v1/completions", json=body | {"stream": True}) as response:
                    if response.status != 200:
                        stream.error = f"{response.status} {(await response.text())[:200]}"
                        return stream
                    async for line in response.content:
                        if line.startswith(b"data: {"):
                            event = json.loads(line[6:])
                            stream.error = stream.error or str(event.get("error") or "")
                            if choices := event.get("choices"):
                                stream.tokens_s.append(time.perf_counter())
                                stream.wordless += not choices[0].get("text")
        except (TimeoutError, OSError, aiohttp.ClientError) as error:
            stream.error = f"{type(error).__name__}: {error}"
        if not stream.tokens_s and not stream.error:
            stream.error = "no token"
        return stream

    async def _post(self, url: str, body: dict[str, Any]) -> str:
        """What went wrong, or nothing."""
        try:
            async with asyncio.timeout(LIMIT_S), self._session.post(f"{url}/v1/completions", json=body) as response:
                await response.read()
                return "" if response.status == 200 else f"prefill: {response.status}"
        except (TimeoutError, OSError, aiohttp.ClientError) as error:
            return f"prefill: {type(error).__name__}: {error}"


def session() -> aiohttp.ClientSession:
    """One without a limit of connections."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None))


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank. Raises ValueError where there are none."""
    if not values:
        raise ValueError("a percentile of nothing")
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
