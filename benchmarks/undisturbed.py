"""What one SGLang says that does prefill and decode by itself, and that nobody disturbs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.bench_cluster import changed_config, running
from benchmarks.reference import Reference, find_references


def undisturbed(folder: Path, model: str | None, lengths: Sequence[int]) -> tuple[list[Reference], int]:
    """A reference for each length, in tokens, and how many near ties were replaced. Starts a cluster for it."""
    with running(changed_config(folder / "alone.yaml", _alone), model=model) as cluster:
        worker = cluster.plan.workers[0]
        found, replaced = find_references(f"http://{worker.host}:{worker.port}", worker.served_model, lengths)
    report.progress(f"  {len(found)} references, {replaced} near ties replaced")
    return found, replaced


def _alone(tree: dict[str, Any]) -> None:
    """One worker that does both."""
    tree["name"] = "alone"
    tree["workers"] = [{"role": "both"}]
