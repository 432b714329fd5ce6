"""One worker: SGLang's server in a role, with an agent beside it, in this process."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from engine.agent import Agent
from engine.spec import EPOCH_VARIABLE, SPEC_VARIABLE, WorkerSpec
from transfer.auth import ClusterKey

ENVIRONMENT = {
    # A worker loads its model from a folder; it never asks a hub.
    "HF_HUB_OFFLINE": "1",
    # Its health is what its scheduler says, not a generation of one token each time somebody asks.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    # Whatever SGLang still binds by itself stays on this host.
    "SGLANG_HOST_IP": "127.0.0.1",
}
RENDEZVOUS_VARIABLE = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
"""SGLang's own variable: where the ranks of a worker meet. By default PyTorch opens a port for that, on every address
of the machine and without a key, also where there is only one rank."""


def run_worker(spec: WorkerSpec) -> None:
    """Runs the worker until it ends; its own process's last act. Raises OSError for a port in use."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(levelname)s %(name)s: %(message)s")
    epoch = time.time_ns()
    run_dir = Path(spec.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "spec.json"
    spec.write(path)
    ours = {**ENVIRONMENT, RENDEZVOUS_VARIABLE: f"file://{run_dir}/rendezvous-{epoch}"}
    os.environ.update({**ours, **spec.environment, SPEC_VARIABLE: str(path), EPOCH_VARIABLE: str(epoch)})
    agent = Agent(spec, epoch, ClusterKey.read(Path(spec.key_file)))
    agent.start()
    # Imported after the environment is set: SGLang reads parts of it when it is imported.
    from engine.sglang_server import log_settings, serve

    logging.getLogger(__name__).info("worker starts %s", log_settings(spec))
    try:
        serve(spec, agent.engine_ready)
    finally:
        agent.close()
