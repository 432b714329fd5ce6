"""SGLang's own flags as a cluster file writes them, and the few that the launcher keeps for itself.

    engine:                                 --page-size 16
      page-size: 16              ──>        --disable-overlap-schedule
      disable-overlap-schedule: true        --cuda-graph-bs 1 2 4
      cuda-graph-bs: [1, 2, 4]              (nothing: false leaves a flag out)
      enable-metrics: false

The names SGLang knows are read from its source file, not by importing it: that
takes half a minute. Abbreviations that its parser would take are refused too,
because one of them could name a flag that the launcher owns.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

FlagValue = bool | int | float | str | list[int | float | str]

_PORTS = "the launcher chooses ports; workers[].port_base sets where they start"
_ROLE = "the launcher sets it from workers[].role"
_EVENTS = "the launcher connects every worker's page events to the router"
_TOKENIZER = "the router renders prompts too, with what lies in the model's folder; put the file there"
_ONE_HOST = "a worker is one SGLang server on one host; for more replicas raise workers[].count"

OWNED: dict[str, str] = {
    "model-path": "set model.path, which holds for all workers and the router",
    "model": "set model.path, which holds for all workers and the router",
    "served-model-name": "set model.served_name",
    "tokenizer-path": _TOKENIZER,
    "chat-template": _TOKENIZER,
    "config": "write the flags here, so that this file says all of it",
    "host": "set workers[].host",
    "port": _PORTS,
    "grpc-port": _PORTS,
    "nccl-port": _PORTS,
    "nccl-init-addr": _PORTS,
    "dist-init-addr": _ONE_HOST,
    "nnodes": _ONE_HOST,
    "node-rank": _ONE_HOST,
    "dp-size": _ONE_HOST,
    "data-parallel-size": _ONE_HOST,
    "grpc-mode": "the router speaks HTTP to the workers",
    "smg-grpc-mode": "the router speaks HTTP to the workers",
    "api-key": "workers are reached through the router; router.api_key_file holds what clients must send",
    "admin-api-key": "workers are reached through the router; router.api_key_file holds what clients must send",
    "disaggregation-mode": _ROLE,
    "disaggregation-transfer-backend": "the hand-off is ours; transfer.transports chooses how it travels",
    "disaggregation-bootstrap-port": _PORTS,
    "kv-events-config": _EVENTS,
}
"""Flag -> why it is refused, and what to set instead."""


def mistake(flag: str, known: frozenset[str]) -> str | None:
    """What is wrong with a flag's name, in words; None where nothing is. An empty `known` checks no spelling."""
    if flag.startswith("-"):
        return f"wanted the name without dashes, write {flag.lstrip('-')!r}"
    if "_" in flag and "-" not in flag:
        return f"wanted SGLang's long name, did you mean {flag.replace('_', '-')!r}?"
    if reason := OWNED.get(flag):
        return f"is not yours to set: {reason}"
    if known and flag not in known:
        close = difflib.get_close_matches(flag, known - OWNED.keys(), n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        return f"unknown SGLang flag{hint}"
    return None


def arguments(flags: Mapping[str, FlagValue]) -> tuple[str, ...]:
    """As SGLang's command line takes them, in the order written."""
    return tuple(word for flag, value in flags.items() for word in _words(flag, value))


def known_flags() -> frozenset[str]:
    """Every flag of the installed SGLang; empty where it is not installed or its source looks different."""
    found = importlib.util.find_spec("sglang")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / "srt" / "server_args.py"
        if path.is_file():
            return parse_flags(path.read_text(encoding="utf-8"))
    return frozenset()


def parse_flags(source: str) -> frozenset[str]:
    """Flags that the text of SGLang's server_args.py names: annotated fields, their aliases, and added by hand."""
    start = source.find("\nclass ServerArgs")
    if start < 0:
        return frozenset()
    fields = re.findall(r"^    ([a-z]\w*): A\[", source[start:], re.MULTILINE)
    spelled = re.findall(r"[\"']--([a-z][a-z0-9-]+)[\"']", source[start:])
    return frozenset(name.replace("_", "-") for name in fields) | frozenset(spelled)


def _words(flag: str, value: FlagValue) -> Iterator[str]:
    if value is False:
        return
    yield f"--{flag}"
    if isinstance(value, list):
        yield from map(str, value)
    elif value is not True:
        yield str(value)
