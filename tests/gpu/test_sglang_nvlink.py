"""Real SGLang on GPUs: prefill hands pages over to decode by `nvlink`, and says what one SGLang says by itself.

MAINSTEM_GPU_MODEL is the folder of a model. Where there are no weights in it, `config.json` and a tokenizer do: weights
are made up then, the same ones in every process. MAINSTEM_GPU_FLAGS are more of SGLang's flags, as YAML. With one GPU
all workers share it: memory is mapped the same way, but no link is crossed.

Where requests come one after the other, every step has the same shape on both sides, and its arithmetic the same result
to the last bit: outputs are compared token by token, and near ties are not left out.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.added_ttft import ahead_pages
from benchmarks.client import Answer, complete, get_json
from benchmarks.gpu_cluster import MODEL as MODEL_NAME
from benchmarks.gpu_cluster import gpu_config
from benchmarks.gpu_systems import all_running
from benchmarks.reference import OUTPUT_TOKENS, VOCABULARY, Reference, generate, prompt_of
from engine.launch.cluster import Cluster

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

PROMPTS = int(os.environ.get("MAINSTEM_GPU_PROMPTS", "200"))
MODEL = "MAINSTEM_GPU_MODEL"
POOL_TOKENS = 16384
"""KV slots of each worker: SGLang would take what another worker of the same GPU has left."""
BEGINNING_TOKENS = 1500
NEAR = 0.5
"""In log-probability: a logit of 20 is a multiple of 0.125 in bfloat16."""


WAYS = {"alone": "never", "whole": "never", "pass": "pass", "layers": "layers"}
"""Systems, and when their pages leave."""
PAIRS = tuple(name for name in WAYS if name != "alone")


def config(folder: Path, name: str) -> Path:
    flags = {"cuda-graph-max-bs": 2, "context-length": 4096}
    flags |= yaml.safe_load(os.environ.get("MAINSTEM_GPU_FLAGS", "{}"))
    return gpu_config(
        folder / f"{name}.yaml",
        Path(os.environ[MODEL]),
        pool_tokens=POOL_TOKENS,
        flags=flags,
        both=int(name == "alone"),
        ahead=WAYS[name],
    )


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Cluster]]:
    """All up at the same time: to start takes longer than to compare."""
    files = {name: config(tmp_path_factory.mktemp(name), name) for name in WAYS}
    with all_running(files) as systems:
        assert set(systems) == set(WAYS), "one did not start: its log is in its folder"
        yield {name: system for name, system in systems.items() if isinstance(system, Cluster)}


@pytest.fixture(scope="module")
def references(clusters: dict[str, Cluster]) -> list[Reference]:
    chooser = random.Random(12)
    lengths = [chooser.randint(5, 3000) for _ in range(PROMPTS)]
    worker = clusters["alone"].plan.workers[0]
    found = []
    for number, length in enumerate(lengths):
        prompt = prompt_of(length, seed=number)
        choice = generate(f"http://{worker.host}:{worker.port}", worker.served_model, prompt)
        found.append(Reference(prompt, choice["logprobs"]["tokens"], choice["text"]))
    texts = len({reference.text for reference in found})
    print(f"{len(found)} prompts of {min(lengths)} to {max(lengths)} tokens, {texts} different outputs")
    assert texts > len(found) / 2, "outputs that are all the same would hide wrong pages"
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_outputs_are_the_monolithic_ones_cold_and_cached(
    references: list[Reference], clusters: dict[str, Cluster], name: str
) -> None:
    cluster = clusters[name]
    assert differing(cluster, references) == []
    assert differing(cluster, references[:20]) == []
    streams = [complete(cluster.url, MODEL_NAME, one.prompt, OUTPUT_TOKENS, ignore_eos=True) for one in references[:40]]
    assert [stream.text for stream in streams] == [reference.text for reference in references[:40]]
    shown = get_json(cluster.url, "/api/state")["requests"]
    by_prefill = sum(one["first_token_from"] == "prefill" for one in shown[:40])
    # Half a character is decode's to say.
    assert by_prefill > 20
    newest = shown[0]
    handoff = get_json(cluster.url, f"/api/explain/{newest['id']}")["handoff"]
    assert handoff["transport"] == "nvlink", handoff
    assert handoff["failed"] == 0
    ahead = ahead_pages(cluster)
    print(
        f"{name}: {len(references)} prompts the same, {ahead} pages left ahead, {by_prefill} of 40 streams by prefill"
    )
    assert (ahead > 0) == (WAYS[name] != "never")


@pytest.mark.parametrize("name", PAIRS)
def test_outputs_are_the_monolithic_ones_where_prompts_are_handed_over_at_once(
    references: list[Reference], clusters: dict[str, Cluster], name: str
) -> None:
    """Passes follow each other without a gap, prompts share them, and pages are granted as soon as others are done with
    them. Arithmetic has other shapes then, and a sum is another in its last bits: log-probabilities may lie as far
    apart as NEAR, and from a token whose second best is as near as twice that an output may be another."""
    cluster, worker = clusters[name], clusters["alone"].plan.workers[0]
    prompts = [prompt_of(length, seed=length) for length in range(700, 2700, 40)]
    alone = [generate(f"http://{worker.host}:{worker.port}", worker.served_model, prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        found = list(threads.map(lambda prompt: generate(cluster.url, MODEL_NAME, prompt), prompts))
    compared, farthest = 0, 0.0
    for one, other in zip(alone, found, strict=True):
        same = same_tokens(one, other)
        compared += same
        assert same == len(tokens(one)) or margin(one, same) < 2 * NEAR, (len(tokens(one)), same, margin(one, same))
        pairs = zip(one["logprobs"]["token_logprobs"][:same], other["logprobs"]["token_logprobs"][:same], strict=True)
        farthest = max([farthest, *(abs(mine - theirs) for mine, theirs in pairs)])
    print(f"{name}: {len(prompts)} prompts at once, {compared} tokens compared, at most {farthest:.4f} apart")
    assert farthest <= NEAR
    assert compared > 1.5 * len(prompts), "the first one comes from prefill: only later ones say what landed"


def test_of_prompts_at_once_that_begin_alike_the_beginning_is_computed_once(clusters: dict[str, Cluster]) -> None:
    """While the GPU computes a pass, SGLang's overlap forms the next one, which finds in the cache nothing of it."""
    cluster, worker = clusters["pass"], clusters["alone"].plan.workers[0]
    chooser = random.Random(13)
    beginning = chooser.choices(VOCABULARY, k=BEGINNING_TOKENS)
    prompts = [beginning + chooser.choices(VOCABULARY, k=40) for _ in range(8)]
    with ThreadPoolExecutor(len(prompts)) as threads:
        # Log-probabilities of a prompt's beginning would have it computed each time.
        found = list(threads.map(lambda prompt: said(cluster, prompt), prompts))
    for answer, prompt in zip(found, prompts, strict=True):
        alone = generate(f"http://{worker.host}:{worker.port}", worker.served_model, prompt)
        spelled = tokens(alone)
        same = max(count for count in range(OUTPUT_TOKENS + 1) if answer.text.startswith("".join(spelled[:count])))
        # Half a character is spelled otherwise.
        apart = same < OUTPUT_TOKENS and "\ufffd" not in spelled[same]
        assert not apart or margin(alone, same) < 2 * NEAR, (same, answer.text, alone["text"])
    cached = sorted(answer.cached_tokens for answer in found)
    print(f"8 prompts at once, {BEGINNING_TOKENS} tokens of each the same: {cached} tokens cached")
    assert cached[0] < 100
    assert cached[1] > BEGINNING_TOKENS - 100


def said(cluster: Cluster, prompt: list[int]) -> Answer:
    answer = complete(cluster.url, MODEL_NAME, prompt, OUTPUT_TOKENS, ignore_eos=True)
    assert answer.error == "", answer
    return answer


def tokens(choice: dict[str, Any]) -> list[str]:
    found: list[str] = choice["logprobs"]["tokens"]
    return found


def same_tokens(one: dict[str, Any], other: dict[str, Any]) -> int:
    """How many of the first ones are."""
    pairs = zip(tokens(one), tokens(other), strict=True)
    return next((number for number, (mine, theirs) in enumerate(pairs) if mine != theirs), len(tokens(one)))


def margin(choice: dict[str, Any], position: int) -> float:
    """How far the two best tokens are apart there, in log-probability."""
    best = sorted(choice["logprobs"]["top_logprobs"][position].values(), reverse=True)
    return best[0] - best[1] if len(best) > 1 else 0.0


def differing(cluster: Cluster, references: list[Reference]) -> list[int]:
    """Lengths of the prompts whose output is another."""
    found = []
    for reference in references:
        choice = generate(cluster.url, cluster.plan.router.model, reference.prompt)
        if (choice["logprobs"]["tokens"], choice["text"]) != (reference.tokens, reference.text):
            found.append(len(reference.prompt))
    return found
