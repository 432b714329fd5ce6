"""What the router is told when it starts: the `router:` table of the cluster file, and what the launcher adds."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


PolicyName = Literal[
    "mainstem",
    "round_robin",
    "random",
    "least_load",
    "power_of_two",
    "session_hash",
    "session_sticky",
    "prefix_hash",
    "longest_prefix",
    "smg_cache_aware_text",
    "smg_cache_aware_events",
    "dynamo_kv",
]


class CostConfig(BaseModel):
    """Constants of the pair's cost, in seconds. `python -m benchmarks.fit` prints them for a machine.

    All but `alpha`, `hot_requests`, `copy_tokens` and `tie_fraction` are only where learning begins.
    """

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
    """Pairs are equals whose costs differ by less than this fraction of what the whole prompt would cost: a page in
    common does not gather all traffic."""
    hot_requests: Annotated[int, Field(ge=1)] = 2
    """A prefix that more requests than this use at once, for each worker that holds it, is copied to one more."""
    copy_tokens: Annotated[int, Field(ge=0)] = 8192
    """Tokens that may be computed once more for such a copy, for each request that uses the prefix."""
    learn: bool = True
    """Whether the constants follow what finished requests took."""


class RouterSection(BaseModel):
    """The `router:` table of a cluster file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback also needs `api_key_file`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    replicas: Annotated[int, Field(ge=1, le=16, strict=True)] = 1
    """Routers in front of the same workers, named router, router-1 and so on: each has the next port, and each counts
    what the others have sent."""
    api_key_file: Path | None = None
    """File with the keys of which clients must send one as `Authorization: Bearer …`, or a browser as the password for
    the dashboard; none: no key is asked for."""
    index_max_bytes: Annotated[int, Field(ge=1_000_000)] = 256 * 1024 * 1024
    """Memory that the prefix index may take."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """A request that has not ended by then is aborted on both workers."""
    first_byte_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """A request whose decode worker has sent nothing by then is aborted on both workers."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A stream that has begun and then says nothing for so long goes on elsewhere."""
    handoff_floor_s: Annotated[float, Field(gt=0)] = 10.0
    """Pages may always take so long to be delivered, and longer where that is usual for their pair: it is learned."""
    hung_s: Annotated[float, Field(gt=0)] = 10.0
    """A worker whose scheduler has not moved for so long gets no requests, and loses those that it has."""
    queue_timeout_s: Annotated[float, Field(ge=0)] = 30.0
    """How long a request waits for room, or for a worker that may come: one that starts, drains, or was just lost."""
    queue_max_requests: Annotated[int, Field(ge=0)] = 1000
    """So many wait at most; of more, those of the busiest tenant are answered with 429."""
    prefill_backlog_s: Annotated[float, Field(gt=0)] = 10.0
    """A prefill worker that has so many seconds to compute, and more than one prompt, gets no more meanwhile."""
    decode_reserve_tokens: Annotated[int, Field(ge=1)] = 512
    """A decode worker gets a request when it has room for its prompt and so many tokens of its answer."""
    on_no_prefill: Literal["fail", "aggregate", "queue"] = "aggregate"
    """Where no prefill worker is ready: 503 at once; a worker of role `both`, if there is one, and else as queue;
    or wait for one."""
    retries: Annotated[int, Field(ge=0, le=16)] = 2
    """How often a request is tried on another pair, as long as decode has said nothing of the answer."""
    resumes: Annotated[int, Field(ge=0, le=16)] = 2
    """How often a stream goes on elsewhere from the tokens that its client has; 0: it ends with an error."""
    first_token_from: Literal["prefill", "decode"] = "prefill"
    """Who says a stream's first token: prefill, which has computed it, while its pages are on their way; or decode,
    when it has them. Prefill only where nothing in the request keeps a stream from going on elsewhere (`resumes`),
    should the hand-off fail then; where there is no other pair it ends with an error event instead of a status."""
    retry_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Further attempts for each request, over all requests: when everything fails, nothing is asked three times."""
    retry_burst: Annotated[int, Field(ge=0)] = 100
    """So many further attempts at once."""
    policy: PolicyName = "mainstem"
    """Who chooses. All but `mainstem` are there to compare with."""
    shadow_policies: tuple[PolicyName, ...] = ()
    """Policies that see the same requests on paper: what hits and balance they would have had (/metrics, dashboard)."""
    seed: int = 0
    """Breaks ties between equal workers."""
    cost: CostConfig = CostConfig()

    @property
    def ports(self) -> range:
        """Where the routers listen, the first one first."""
        return range(self.port, self.port + self.replicas)

    @model_validator(mode="after")
    def _ports_that_exist(self) -> RouterSection:
        if self.ports[-1] > 65535:
            raise ValueError(f"replicas: wanted ports up to 65535, found {self.ports[-1]} for the last one")
        return self

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
    name: str = "router"
    """By which other routers in front of the same workers know this one."""
    gossip_port: int = 0
    """Where it tells them what it has in flight, on the host of its section; 0: there are no others."""
    peers: tuple[str, ...] = ()
    """ZeroMQ addresses on which the others tell."""
