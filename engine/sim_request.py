"""A request inside a simulated worker."""

from __future__ import annotations

from typing import Literal

from engine.sim_cache import Node
from engine.sim_job import SimJob

Place = Literal["waiting", "prefilling", "running", "handing", "transferring", "ready", "retracted", "gone"]
"""Where it is. handing: of a prefill worker, its KV is on the way. transferring: of a decode worker, its
pages are there and the KV is not; ready: it is."""


class Request:
    """What a job has come to.

    chain      ids of its whole pages, as far as they are known
    output     tokens it will answer, cut to what the pool allows
    max_new    tokens it may answer, cut likewise
    generated  tokens it has answered; not kept up while it runs
    fill       tokens whose KV is needed for the next token
    done       of them, those whose KV is there
    cached     tokens that were cached when it was first admitted; -1 before
    uncached   tokens that count as queued
    node       the last node of the tree it uses; its first `shared` pages lie there
    private    pages of its own; not kept up while it runs
    kv_base    KV tokens less the worker's count of decode steps, while it runs
    end_step   the step with its last token, likewise
    aborted    why it has to end; "" while it need not
    """

    __slots__ = (
        "aborted",
        "cached",
        "chain",
        "done",
        "end_step",
        "fill",
        "generated",
        "job",
        "kv_base",
        "max_new",
        "node",
        "output",
        "place",
        "private",
        "rid",
        "shared",
        "uncached",
    )

    def __init__(self, job: SimJob, node: Node) -> None:
        self.job = job
        self.rid = job.rid
        ids = job.output_ids if len(job.output_ids) > len(job.ids) else job.ids
        self.chain = tuple(ids)
        self.output = job.output_tokens
        self.max_new = max(job.max_new_tokens, job.output_tokens)
        self.generated = 0
        self.fill = job.prompt_tokens
        self.done = 0
        self.cached = -1
        self.uncached = 0
        self.node = node
        self.shared = 0
        self.private = 0
        self.kv_base = 0
        self.end_step = 0
        self.place: Place = "waiting"
        self.aborted = ""
