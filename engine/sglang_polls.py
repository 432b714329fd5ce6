"""Asking the ranks of a worker how its hand-offs stand, where there is one rank: it asks itself.

SGLang's scheduler brings all ranks to one opinion, several times in each tick, with an all-reduce over gloo.
With one rank that changes nothing, and takes from half a millisecond to a quarter of a second on a busy CPU:
gloo runs in threads of its own, which wait for their turn like everybody else.
"""

from __future__ import annotations

from typing import Any

import torch.distributed
from sglang.srt.disaggregation import utils as disaggregation
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine.told_failures import tell


def apply() -> None:
    """Registers the hooks. To be called while SGLang loads its plug-ins."""
    utils = "sglang.srt.disaggregation.utils."
    HookRegistry.register(utils + "poll_and_all_reduce", polls, HookType.AROUND)
    HookRegistry.register(utils + "poll_and_all_reduce_attn_cp_tp_group", polls_of_both, HookType.AROUND)


def polls(
    original: Any,
    pollers: Any,
    gloo_group: Any,
    decode_reqs: Any = None,
    metadata_buffers: Any = None,
    server_args: Any = None,
) -> list[int]:
    """As SGLang's on a decode worker, without asking others where there are none; few failures at once."""
    if torch.distributed.get_world_size(gloo_group) != 1:
        answer: list[int] = original(pollers, gloo_group, decode_reqs, metadata_buffers, server_args)
        return answer
    found: list[int] = disaggregation._poll_with_failure_injection(pollers)
    if decode_reqs is None:
        return tell(found, KVPoll.Failed, KVPoll.Bootstrapping)
    disaggregation._apply_metadata_gate(found, decode_reqs, metadata_buffers, server_args)
    return tell(found, KVPoll.Failed, KVPoll.Transferring)


def polls_of_both(original: Any, pollers: Any, attn_cp_cpu_group: Any, attn_tp_cpu_group: Any) -> list[int]:
    """The same for the ranks of a prefill worker, which are counted in two directions."""
    groups = (attn_cp_cpu_group, attn_tp_cpu_group)
    if any(torch.distributed.get_world_size(group) != 1 for group in groups):
        answer: list[int] = original(pollers, *groups)
        return answer
    found: list[int] = disaggregation._poll_with_failure_injection(pollers)
    return found
