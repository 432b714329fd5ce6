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
from typing import Any

import pytest
import yaml

from benchmarks.client import get_json
from benchmarks.reference import Reference, generate, prompt_of
from engine.config import ClusterConfig, parse_cluster
from engine.launch.cluster import Cluster
from tests.cluster.conftest import free_port, started
from transfer.cuda import CudaFailed, Device

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PROMPTS = int(os.environ.get("MAINSTEM_GPU_PROMPTS", "200"))
MODEL = "MAINSTEM_GPU_MODEL"
POOL_TOKENS = 16384
"""KV slots of each worker: SGLang would take what another worker of the same GPU has left."""


def gpus() -> int:
    count = 0
    try:
        while True:
            Device(count)
            count += 1
    except CudaFailed:
        return count


def config(**changes: Any) -> ClusterConfig:
    """configs/1p1d-nvlink.yaml, for this machine and model."""
    tree = yaml.safe_load((ROOT / "configs" / "1p1d-nvlink.yaml").read_text())
    model = Path(os.environ[MODEL])
    tree["model"] = {"path": str(model), "served_name": "tested"}
    engine: dict[str, Any] = {
        "disable-cuda-graph": True,
        "skip-server-warmup": True,
        "context-length": 4096,
        "max-total-tokens": POOL_TOKENS,
    }
    if not list(model.glob("*.safetensors")):
        engine["load-format"] = "dummy"
    if gpus() == 1:
        for group in tree["workers"]:
            group["engine"]["base-gpu-id"] = 0
    tree["engine"] |= engine | yaml.safe_load(os.environ.get("MAINSTEM_GPU_FLAGS", "{}"))
    tree["router"]["port"] = free_port()
    tree |= changes
    return parse_cluster(yaml.safe_dump(tree), ROOT / "configs")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    chooser = random.Random(12)
    lengths = [chooser.randint(5, 3000) for _ in range(PROMPTS)]
    alone = config(workers=[{"role": "both", "count": 1}])
    with started(alone, tmp_path_factory.mktemp("alone")) as cluster:
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


def test_outputs_are_the_monolithic_ones_cold_and_cached(
    references: list[Reference], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with started(config(), tmp_path_factory.mktemp("pair")) as cluster:
        assert differing(cluster, references) == []
        assert differing(cluster, references[:20]) == []
        newest = get_json(cluster.url, "/api/state")["requests"][0]
        handoff = get_json(cluster.url, f"/api/explain/{newest['id']}")["handoff"]
        assert handoff["transport"] == "nvlink", handoff
        assert handoff["failed"] == 0


def differing(cluster: Cluster, references: list[Reference]) -> list[int]:
    """Lengths of the prompts whose output is another."""
    found = []
    for reference in references:
        choice = generate(cluster.url, cluster.plan.router.model, reference.prompt)
        if (choice["logprobs"]["tokens"], choice["text"]) != (reference.tokens, reference.text):
            found.append(len(reference.prompt))
    return found
