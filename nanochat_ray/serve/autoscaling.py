"""How many replicas the load wants. Serve's own policy counts requests; this one also sees the cache fill up.

A replica is at its limit when as many replies run as it takes, or when long conversations hold its cache, which may be
much earlier.
"""

from collections.abc import Iterable
from typing import Any

FULL_CACHE = 0.85  # of the blocks; from here on replies would be preempted


def replicas_wanted(replies: float, replies_each: float, replicas: int, cache_use: Iterable[float]) -> float:
    """Enough for the replies that run and wait, and for the blocks that they hold.

    Args:
        replies: that run and wait, everywhere.
        replies_each: as many as a replica shall have.
        replicas: that there are.
        cache_use: of each of them, as a fraction.
    """
    use = list(cache_use)
    for_cache = replicas * sum(use) / len(use) / FULL_CACHE if use else 0.0
    return max(replies / replies_each, for_cache)


def policy(context: Any) -> tuple[float, dict[str, Any]]:
    """As Serve calls it, with its `AutoscalingContext`; Serve then applies its bounds and delays."""
    use = (context.aggregated_metrics or {}).get("kv_use", {})
    each = context.config.get_target_ongoing_requests()
    wanted = replicas_wanted(context.total_num_requests, each, context.current_num_replicas, use.values())
    return wanted, {}
