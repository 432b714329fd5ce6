"""configs/1p1d-nvlink.yaml for whatever GPUs this machine has, and for a model that may be made up.

With one GPU all workers share it: memory is mapped the same way, but no link is crossed, and workers compete.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from transfer.cuda import CudaFailed, Device

MODEL = "measured"
NVLINK = Path(__file__).parents[1] / "configs" / "1p1d-nvlink.yaml"


def gpu_count() -> int:
    count = 0
    try:
        while True:
            Device(count)
            count += 1
    except CudaFailed:
        return count


def gpu_config(
    file: Path,
    model: Path,
    *,
    pool_tokens: int,
    flags: dict[str, Any],
    both: int = 0,
    ahead: str | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Writes the cluster file.

    model        a folder; where there are no weights in it, its config and a tokenizer do: weights are made up then,
                 the same ones in every process
    pool_tokens  KV slots of each worker: SGLang would take what another worker of the same GPU has left
    flags        more of SGLang's flags
    both         so many workers that do both, on a GPU each as far as there are any, in place of the pair
    ahead        as in the section `transfer`; None: what the file says, or the default
    environment  more variables of every worker's
    """
    tree = yaml.safe_load(NVLINK.read_text())
    tree["model"] = {"path": str(model), "served_name": MODEL}
    # SGLang's own scheduler spins where it has nothing to do, and takes a core from those that are measured.
    engine: dict[str, Any] = {"skip-server-warmup": True, "max-total-tokens": pool_tokens, "sleep-on-idle": True}
    if not list(model.glob("*.safetensors")):
        engine["load-format"] = "dummy"
    tree["engine"] |= engine | flags
    gpus = max(1, gpu_count())
    if both:
        tree["workers"] = [
            {"role": "both", "count": 1, "engine": {"base-gpu-id": number % gpus}} for number in range(both)
        ]
    for group in tree["workers"]:
        group["engine"]["base-gpu-id"] %= gpus
    if ahead is not None:
        tree["transfer"]["ahead"] = ahead
    tree["environment"] = {**tree.get("environment", {}), **environment}
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))
        tree["router"]["port"] = placeholder.getsockname()[1]
    file.write_text(yaml.safe_dump(tree))
    return file
