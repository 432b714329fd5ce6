"""Baselines by name."""

from __future__ import annotations

from collections.abc import Callable

from router.baselines.dynamo_kv import DynamoKv
from router.baselines.least_load import LeastLoad
from router.baselines.longest_prefix import LongestPrefix
from router.baselines.power_of_two import PowerOfTwo
from router.baselines.prefix_hash import PrefixHash
from router.baselines.random_choice import RandomChoice
from router.baselines.round_robin import RoundRobin
from router.baselines.session_hash import SessionHash
from router.baselines.session_sticky import SessionSticky
from router.baselines.smg_events import SmgCacheAwareEvents
from router.baselines.smg_text import SmgCacheAwareText
from router.policy import Policy

BASELINES: dict[str, Callable[[int], Policy]] = {
    RoundRobin.name: RoundRobin,
    RandomChoice.name: RandomChoice,
    LeastLoad.name: LeastLoad,
    PowerOfTwo.name: PowerOfTwo,
    SessionHash.name: SessionHash,
    SessionSticky.name: SessionSticky,
    PrefixHash.name: PrefixHash,
    LongestPrefix.name: LongestPrefix,
    SmgCacheAwareText.name: SmgCacheAwareText,
    SmgCacheAwareEvents.name: SmgCacheAwareEvents,
    DynamoKv.name: DynamoKv,
}
"""A policy that has seen nothing yet, by name, from a seed."""
