"""What the router is told when it starts: the `router:` table of the cluster file, and what the launcher adds."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class CostConfig(BaseModel):
    """Constants of the pair's cost, in seconds. `python -m benchmarks.fit` prints them for a machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: Annotated[float, Field(ge=1)] = 4.0
    """How many seconds of waiting one second of avoided prefill is worth (workload study: 4 won on every trace)."""
    prefill_overhead_s: Annotated[float, Field(ge=0)] = 0.05
    """A prefill that computes nothing still takes this long."""
    prefill_tokens_per_s: Annotated[float, Field(gt=0)] = 250.0
    """Uncached prompt tokens that one prefill worker computes in a second, at a short context."""
    context_halving_tokens: Annotated[float, Field(gt=0)] = 8000.0
    """Context length at which a token costs twice what it costs at the start."""
    handoff_bytes_per_s: Annotated[float, Field(gt=0)] = 1e9
    """Bandwidth of a hand-off between a pair."""
    page_bytes: Annotated[int, Field(gt=0)] = 720 * 1024
    """Bytes of one page over all layers, K and V."""
    decode_request_s: Annotated[float, Field(ge=0)] = 0.02
    """What one more running request costs those on the same decode worker."""
    tie_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Pairs whose costs differ by less than this fraction are equals: a page in common does not gather all traffic."""


class RouterSection(BaseModel):
    """The `router:` table of a cluster file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback also needs `api_key_file`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_key_file: Path | None = None
    """File with the key that clients must send as `Authorization: Bearer …`; none: no key is asked for."""
    index_max_bytes: Annotated[int, Field(ge=1_000_000)] = 256 * 1024 * 1024
    """Memory that the prefix index may take."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """A request that has not ended by then is aborted on both workers."""
    first_byte_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """A request whose decode worker has sent nothing by then is aborted on both workers."""
    seed: int = 0
    """Breaks ties between equal workers."""
    cost: CostConfig = CostConfig()

    @model_validator(mode="after")
    def _open_only_with_a_key(self) -> RouterSection:
        if self.api_key_file is None and not is_loopback(self.host):
            raise ValueError(f"api_key_file: wanted a file, as host {self.host!r} is not loopback, found none")
        return self


class RouterSpec(BaseModel):
    """Everything that one router process needs; the launcher writes it as JSON for `mainstem router --spec FILE`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    section: RouterSection
    model: str
    """The name clients ask for."""
    model_path: Path
    """Folder with the tokenizer and the chat template that the engine uses too."""
    key_file: Path
    """The cluster's key."""
    cluster: str
    """The cluster's name, shown on the dashboard."""
