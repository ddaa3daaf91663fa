"""On each spot machine: turns the cloud's notice that the machine will be taken into a drain of its own Ray node.

    python -m cluster.notice_watcher --cloud aws --address $RAY_HEAD_IP:6379

Ray asks no cloud for such notices itself; once its node drains for preemption, worker 0 of a run that uses it tells the
others (nanochat_ray/train/elastic.py), and Ray Serve moves replicas away. Kubernetes needs no watcher: there SIGTERM
does the same (cluster/k8s/ray-cluster.yaml).

Needs Python, ray, and RAY_AUTH_MODE as the cluster has it. Exit codes: 0 the machine was taken (drained, and its
deadline has passed), 1 failed, 2 wrong usage.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable

from cluster.cloud_notices import CLOUDS, Metadata, MetadataError, Notice

METADATA_ENDPOINT = "http://169.254.169.254"  # the same link-local address on all three clouds
RAY_TIMEOUT_S = 5.0
RETRY_S = 1.0
SHORT_PAUSE_S = 0.1

log = logging.getLogger("notice_watcher")


class WatcherError(Exception):
    """What a person has to mend; the message says it in one line."""


def detect_cloud(endpoint: str) -> Metadata:
    """The cloud whose metadata service answers.

    Raises:
        WatcherError: none does.
    """
    for make in CLOUDS.values():
        metadata = make(endpoint)
        try:
            if metadata.answers():
                return metadata
        except MetadataError as error:
            log.info("not %s: %s", metadata.name, error)
    raise WatcherError(f"no cloud's metadata service answers at {endpoint}; if this is a spot machine, give --cloud")


class RayNode:
    """The Ray node of this machine, as the cluster's GCS knows it.

    `ray drain-node` would do the same, but takes seconds to start (of the 30 that GCP gives) and a deadline in whole
    seconds; so this holds one connection, made before there is a notice. Both ways are private to Ray: the test of this
    file holds them to the version in pyproject.toml.

    Raises:
        WatcherError: no cluster answers at the address, or it has no node, or several, on this machine.
    """

    def __init__(self, address: str, node_id: str | None) -> None:
        import ray
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        self.address = address
        try:
            self._gcs = GcsClient(address=address)
            self.node_id = node_id or self._find()
        except ray.exceptions.RayError as error:
            raise WatcherError(
                f"no Ray cluster answers at {address} ({_first_line(error)}); check --address"
            ) from error

    def _find(self) -> str:
        import ray
        from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

        here = ray.util.get_node_ip_address()
        nodes = self._gcs.get_all_node_info(timeout=RAY_TIMEOUT_S).values()
        # In hex: GCS takes an id in bytes as well, and then silently drains nothing.
        found = [
            node.node_id.hex()
            for node in nodes
            if node.node_manager_address == here and node.state == GcsNodeInfo.GcsNodeState.ALIVE
        ]
        if len(found) != 1:
            raise WatcherError(
                f"the cluster at {self.address} has {len(found)} nodes at {here}"
                + (f" ({', '.join(found)}); say with --node-id which to drain" if found else "; start Ray first")
            )
        return found[0]

    def drain(self, notice: Notice) -> None:
        """Mark the node as draining: nothing new is placed there, and all who ask learn the deadline.

        Raises:
            WatcherError: Ray did not take it.
        """
        import ray
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

        deadline_ms = round(notice.deadline * 1000) if notice.deadline is not None else 0  # 0: none
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        try:
            taken, why = self._gcs.drain_node(self.node_id, reason, notice.reason, deadline_ms, timeout=RAY_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise WatcherError(f"Ray at {self.address} did not answer ({_first_line(error)})") from error
        if not taken:
            raise WatcherError(f"Ray at {self.address} refused to drain node {self.node_id}: {why}")


def watch(
    metadata: Metadata, drain: Callable[[Notice], None], poll_s: float, drain_on_rebalance: bool = False
) -> Notice:
    """Poll until this machine is surely to be taken and `drain` has done its work; returns that notice.

    Raises:
        WatcherError: `drain` failed until the deadline.
    """
    last_problem, recommended = "", False
    while True:
        started = time.monotonic()
        try:
            notice = metadata.poll(poll_s)
            if last_problem:
                log.info("%s answers again", metadata.name)
            last_problem = ""
        except MetadataError as error:
            notice = None
            if str(error) != last_problem:  # a service that is down for hours is one line, not one per poll
                log.warning("%s; trying again every %g s", error, poll_s)
            last_problem = str(error)
        if notice is not None and notice.certain:
            _drain_in_time(notice, drain)
            return notice
        if notice is not None and not recommended:
            recommended = True
            if drain_on_rebalance:
                _drain_in_time(notice, drain)
            else:
                log.info("%s; nothing is done about it without --drain-on-rebalance", notice.reason)
        # After an error, too, the full pause; the short one is for a service that does not wait as it was asked.
        rest_s = started + poll_s - time.monotonic()
        time.sleep(SHORT_PAUSE_S if metadata.waits and not last_problem else max(0.0, rest_s))


def _drain_in_time(notice: Notice, drain: Callable[[Notice], None]) -> None:
    """Drain, and try again while there is time; a recommendation, which has no deadline, gets one try."""
    left = "no deadline" if notice.deadline is None else f"{notice.deadline - time.time():.1f} s left"
    log.warning("%s, %s: draining", notice.reason, left)
    while True:
        try:
            drain(notice)
        except WatcherError as error:
            if notice.deadline is None or time.time() + RETRY_S >= notice.deadline:
                raise
            log.warning("%s; trying again", error)
            time.sleep(RETRY_S)
        else:
            log.info("drained")
            return


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.notice_watcher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cloud", choices=[*CLOUDS, "auto"], default="auto", help="whose notices (default: found out)")
    parser.add_argument("--address", default=None, help="HOST:PORT of the cluster's GCS (default: this machine's Ray)")
    parser.add_argument(
        "--node-id", default=None, help="hex id of the node to drain (default: the one on this machine)"
    )
    parser.add_argument(
        "--poll", type=_poll_seconds, default=2.0, metavar="S", help="seconds between polls (default: 2)"
    )
    parser.add_argument("--drain-on-rebalance", action="store_true", help="drain already when AWS recommends to leave")
    parser.add_argument(
        "--endpoint", default=METADATA_ENDPOINT, help="URL of the metadata service (default: %(default)s)"
    )
    return parser


def _poll_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 60:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 60")
    return seconds


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    try:
        endpoint = args.endpoint.rstrip("/")
        metadata = detect_cloud(endpoint) if args.cloud == "auto" else CLOUDS[args.cloud](endpoint)
        node = RayNode(_cluster_address(args.address), args.node_id)
        log.info("watching %s for Ray node %s of %s", metadata.name, node.node_id, node.address)
        notice = watch(metadata, node.drain, args.poll, args.drain_on_rebalance)
    except WatcherError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nobody watches this machine now", file=sys.stderr, flush=True)
        return 1
    time.sleep(max(0.0, (notice.deadline or 0.0) - time.time()))
    log.info("the deadline has passed")
    return 0


def _cluster_address(given: str | None) -> str:
    """HOST:PORT as given, or of the cluster that RAY_ADDRESS names, or of this machine's Ray.

    Raises:
        WatcherError: there is none, or it is no address.
    """
    from ray._private.services import canonicalize_bootstrap_address

    try:
        address = canonicalize_bootstrap_address(given or "auto")
    except (ValueError, ConnectionError, OSError) as error:
        raise WatcherError(
            f"no Ray cluster at {given or 'this machine'} ({_first_line(error)}); check --address"
        ) from error
    if address is None:
        raise WatcherError("no Ray runs on this machine; start it first, or give --address")
    return address


if __name__ == "__main__":
    raise SystemExit(main())
