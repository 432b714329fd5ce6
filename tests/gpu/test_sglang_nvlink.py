"""Real SGLang on GPUs: prefill hands pages over to decode by `nvlink`, and says what one SGLang says by itself.

MAINSTEM_GPU_MODEL is the folder of a model. Where there are no weights in it, `config.json` and a tokenizer do: weights
are made up then, the same ones in every process. MAINSTEM_GPU_FLAGS are more of SGLang's flags, as YAML. With one GPU
all workers share it: memory is mapped the same way, but no link is crossed.

Requests come one after the other, so that every step has the same shape on both sides, and its arithmetic the same
result to the last bit: outputs are compared token by token, and near ties are not left out.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import yaml

from benchmarks.added_ttft import ahead_pages
from benchmarks.client import get_json
from benchmarks.gpu_cluster import gpu_config
from benchmarks.reference import Reference, generate, prompt_of
from engine.config import ClusterConfig, read_cluster
from engine.launch.cluster import Cluster
from tests.cluster.conftest import started

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

PROMPTS = int(os.environ.get("MAINSTEM_GPU_PROMPTS", "200"))
MODEL = "MAINSTEM_GPU_MODEL"
POOL_TOKENS = 16384
"""KV slots of each worker: SGLang would take what another worker of the same GPU has left."""


def config(folder: Path, *, both: int = 0, layerwise_bytes: int | None = None) -> ClusterConfig:
    flags = {"disable-cuda-graph": True, "context-length": 4096}
    flags |= yaml.safe_load(os.environ.get("MAINSTEM_GPU_FLAGS", "{}"))
    model = Path(os.environ[MODEL])
    file = folder / "cluster.yaml"
    gpu_config(file, model, pool_tokens=POOL_TOKENS, flags=flags, both=both, layerwise_bytes=layerwise_bytes)
    return read_cluster(file)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    chooser = random.Random(12)
    lengths = [chooser.randint(5, 3000) for _ in range(PROMPTS)]
    folder = tmp_path_factory.mktemp("alone")
    with started(config(folder, both=1), folder) as cluster:
        worker = cluster.plan.workers[0]
        url = f"http://{worker.host}:{worker.port}"
        found = []
        for number, length in enumerate(lengths):
            prompt = prompt_of(length, seed=number)
            choice = generate(url, worker.served_model, prompt)
            found.append(Reference(prompt, choice["logprobs"]["tokens"], choice["text"]))
    texts = len({reference.text for reference in found})
    print(f"{len(found)} prompts of {min(lengths)} to {max(lengths)} tokens, {texts} different outputs")
    assert texts > len(found) / 2, "outputs that are all the same would hide wrong pages"
    return found


@pytest.mark.parametrize("layerwise_bytes", [None, 1 << 20], ids=["whole", "layers"])
def test_outputs_are_the_monolithic_ones_cold_and_cached(
    references: list[Reference], tmp_path_factory: pytest.TempPathFactory, layerwise_bytes: int | None
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    with started(config(folder, layerwise_bytes=layerwise_bytes), folder) as cluster:
        assert differing(cluster, references) == []
        assert differing(cluster, references[:20]) == []
        newest = get_json(cluster.url, "/api/state")["requests"][0]
        handoff = get_json(cluster.url, f"/api/explain/{newest['id']}")["handoff"]
        assert handoff["transport"] == "nvlink", handoff
        assert handoff["failed"] == 0
        assert (ahead_pages(cluster) > 0) == (layerwise_bytes is not None), "long prompts' pages leave layer by layer"


def differing(cluster: Cluster, references: list[Reference]) -> list[int]:
    """Lengths of the prompts whose output is another."""
    found = []
    for reference in references:
        choice = generate(cluster.url, cluster.plan.router.model, reference.prompt)
        if (choice["logprobs"]["tokens"], choice["text"]) != (reference.tokens, reference.text):
            found.append(len(reference.prompt))
    return found
