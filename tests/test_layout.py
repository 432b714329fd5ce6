"""The arrows between packages, and what the project may never say."""

from __future__ import annotations

import ast
import re
import subprocess
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "transfer": {"transfer"},
    "router": {"router", "transfer"},
    "engine": {"engine", "transfer"},
    # The composition root: it starts routers, and checks their part of the cluster file.
    "engine/launch": {"engine", "router", "transfer"},
    "engine/config.py": {"engine", "router", "transfer"},
}
PURE = [
    *(
        f"transfer/{name}.py"
        for name in (
            "pages",
            "wire",
            "layout",
            "plan",
            "session",
            "handoff",
            "deadlines",
            "memory",
            "tensor_parallel",
            "undecodable",
        )
    ),
    *(
        f"engine/{name}.py"
        for name in (
            "journal",
            "page_events",
            "told_failures",
            "token_marks",
            "launch/supervision",
            "sim",
            "sim_cache",
            "sim_job",
            "sim_request",
            "sim_running",
            "sim_time",
        )
    ),
    *(
        f"router/{name}.py"
        for name in (
            "answer",
            "audit",
            "avoid",
            "bandwidths",
            "cost",
            "deadlines",
            "decision",
            "expected",
            "fair_queue",
            "faults",
            "fit",
            "fleet",
            "gossip",
            "usual_times",
            "handoffs",
            "health",
            "holder_sets",
            "index",
            "leaf_order",
            "ledger",
            "lifecycle",
            "mirror",
            "openai",
            "page_lru",
            "page_table",
            "pair_cost",
            "pairs",
            "paper_fleet",
            "placement",
            "policies",
            "policy",
            "request_log",
            "resume",
            "retry_budget",
            "sequence",
            "shadow",
            "token_stream",
            "trace_context",
            "truth",
        )
    ),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "router" / "baselines").glob("*.py"))),
]
IMPURE_MODULES = {"asyncio", "time", "random", "socket", "logging", "os", "threading", "zmq", "aiohttp", "subprocess"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything that the file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("folder", ["transfer", "router", "engine"])
def test_packages_import_only_along_the_arrows(folder: str) -> None:
    ours = {"engine", "router", "transfer", "benchmarks", "tests"}
    for path in sources(folder):
        place = path.relative_to(ROOT)
        rule = next(MAY_IMPORT[key] for key in (str(place), "/".join(place.parts[:2]), folder) if key in MAY_IMPORT)
        assert imported(path) & ours <= rule, place


def test_only_the_adapter_imports_sglang_and_the_router_is_light() -> None:
    for path in [*sources("engine"), *sources("router"), *sources("transfer")]:
        place = str(path.relative_to(ROOT))
        if not place.startswith("engine/sglang_"):
            assert "sglang" not in imported(path), place
        if place.startswith(("router/", "transfer/")):
            assert not imported(path) & {"torch", "transformers"}, place


@pytest.mark.parametrize("place", PURE)
def test_pure_files_have_no_clock_no_sockets_and_no_chance(place: str) -> None:
    assert not imported(ROOT / place) & IMPURE_MODULES


def test_nobody_else_ships_our_package_names() -> None:
    shipped = packages_distributions()
    for name in ("engine", "router", "transfer"):
        assert set(shipped.get(name, [])) <= {"mainstem"}, name


def test_no_committed_file_names_an_index_host_or_is_large() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    hosts = re.compile(r"pypi\.org|pythonhosted|files\.python|registry\.npm|deb\.debian", re.IGNORECASE)
    for name in filter(None, listed):
        path = ROOT / name
        if not path.is_file():
            continue
        assert path.stat().st_size < 1_000_000, name
        if path.suffix != ".png" and path != Path(__file__):
            assert not hosts.search(path.read_text()), name
