"""What the clouds tell a machine about its own end: the metadata services of AWS, GCP and Azure, read without Ray.

    AWS     spot/instance-action, 120 s ahead; rebalance recommendations, earlier and often in vain
    GCP     instance/preempted, 30 s ahead
    Azure   scheduled events of type Preempt, at least 30 s ahead; none is acknowledged, which would end the machine now

First what their answers mean (pure functions of text), then how they are asked. Standard library only.
"""

import http.client
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

GCP_NOTICE_S = 30.0  # from `preempted` to the end of the machine, as documented; the answer itself has no time
HTTP_TIMEOUT_S = 3.0


class MetadataError(Exception):
    """The metadata service gave no answer, or none that this program understands. The next poll may do better."""


@dataclass(frozen=True)
class Notice:
    """That this machine will, or may, be taken.

    Args:
        certain: False for a mere recommendation to leave.
        reason: in words, for the log and for Ray's.
        deadline: when the machine ends, in seconds since 1970; None if the cloud did not say.
    """

    certain: bool
    reason: str
    deadline: float | None


# What the clouds' answers mean: pure functions of their text.


def aws_instance_action(body: str) -> Notice:
    """`{"action": "terminate", "time": "2026-11-22T08:22:00Z"}`

    Raises:
        MetadataError: it is something else.
    """
    with _expecting("AWS instance-action", body):
        answer = json.loads(body)
        return Notice(True, f"AWS will {answer['action']} this machine", _iso_time(answer["time"]))


def aws_rebalance(body: str) -> Notice:
    """`{"noticeTime": "2026-11-22T08:22:00Z"}`: a raised risk, with no deadline.

    Raises:
        MetadataError: it is something else.
    """
    with _expecting("AWS rebalance", body):
        since = json.loads(body)["noticeTime"]
        _iso_time(since)
        return Notice(False, f"AWS recommends to leave this machine since {since}", None)


def gcp_preempted(body: str, now: float) -> Notice | None:
    """`TRUE` or `FALSE`.

    Raises:
        MetadataError: it is something else.
    """
    with _expecting("GCP preempted", body):
        preempted = {"TRUE": True, "FALSE": False}[body.strip()]
        return Notice(True, "GCP preempts this machine", now + GCP_NOTICE_S) if preempted else None


def azure_scheduled_events(body: str, machine: str, now: float) -> Notice | None:
    """The earliest preemption of `machine` in `{"Events": [{"EventType", "Resources", "NotBefore", …}]}`.

    The list holds events of the whole group of machines. An event that has begun has an empty `NotBefore`.

    Raises:
        MetadataError: it is something else.
    """
    with _expecting("Azure scheduled events", body):
        times = [
            parsedate_to_datetime(event["NotBefore"]).timestamp() if event["NotBefore"] else now
            for event in json.loads(body)["Events"]
            if event["EventType"] == "Preempt" and machine in event["Resources"]
        ]
        return Notice(True, f"Azure preempts {machine}", min(times)) if times else None


def _iso_time(text: str) -> float:
    time_of = datetime.fromisoformat(text)
    if time_of.tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return time_of.timestamp()


@contextmanager
def _expecting(what: str, body: str) -> Iterator[None]:
    """Turns what goes wrong while an answer is read into a MetadataError that shows the answer."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
        # The last two: a year that this machine's clock cannot hold.
        raise MetadataError(f"{what}: cannot read {body[:200]!r}") from error


# Asking for them.


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Hands every status to the caller, and so follows no redirection."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response


# Metadata never go through a proxy, whatever the environment says.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _AnyStatus())


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    body: str


def request(url: str, headers: dict[str, str], method: str = "GET", wait_s: float = 0.0) -> Answer:
    """Ask, and give the service `wait_s` seconds more than usual to answer.

    Raises:
        MetadataError: no answer in time, or none in HTTP.
    """
    question = urllib.request.Request(url, headers=headers, method=method)
    try:
        with _OPENER.open(question, timeout=wait_s + HTTP_TIMEOUT_S) as response:
            return Answer(response.status, response.headers, response.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException) as error:
        raise MetadataError(f"{method} {url}: {error}") from error


def _require_ok(answer: Answer, url: str) -> Answer:
    if answer.status != 200:
        raise MetadataError(f"{url} answered {answer.status}: {answer.body[:100]!r}")
    return answer


class Metadata(Protocol):
    """One cloud's metadata service, seen from inside a machine."""

    name: str
    waits: bool  # whether `poll` itself waits for news

    def answers(self) -> bool:
        """Whether this cloud's service is what answers here.

        Raises:
            MetadataError: nothing answers.
        """
        ...

    def poll(self, wait_s: float) -> Notice | None:
        """The notice that stands now, or arrives within `wait_s` where the service can wait.

        Raises:
            MetadataError: the service gave no usable answer.
        """
        ...


class Aws:
    """EC2's instance metadata, version 2: every question carries a token that was asked for with PUT."""

    name = "aws"
    waits = False

    def __init__(self, endpoint: str) -> None:
        self.url = f"{endpoint}/latest"
        self.token: str | None = None

    def answers(self) -> bool:
        return self._renew_token().status == 200

    def poll(self, wait_s: float) -> Notice | None:
        action = self._get("spot/instance-action")
        if action is not None:
            return aws_instance_action(action)
        rebalance = self._get("events/recommendations/rebalance")
        return aws_rebalance(rebalance) if rebalance is not None else None

    def _renew_token(self) -> Answer:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        answer = request(f"{self.url}/api/token", headers, "PUT")
        self.token = answer.body if answer.status == 200 else None
        return answer

    def _get(self, item: str) -> str | None:
        """The item's text; None where there is none, which AWS says with 404."""
        url = f"{self.url}/meta-data/{item}"
        for _ in range(2):
            if self.token is None:
                _require_ok(self._renew_token(), f"{self.url}/api/token")
            answer = request(url, {"X-aws-ec2-metadata-token": self.token or ""})
            if answer.status != 401:
                break
            self.token = None  # expired
        return None if answer.status == 404 else _require_ok(answer, url).body


class Gcp:
    """Compute Engine's metadata, which can hold an answer back until the value changes."""

    name = "gcp"
    waits = True

    def __init__(self, endpoint: str) -> None:
        self.url = f"{endpoint}/computeMetadata/v1/instance"
        self.etag = "0"  # differs from every real one, so that the first answer comes at once

    def answers(self) -> bool:
        return request(f"{self.url}/id", {"Metadata-Flavor": "Google"}).headers.get("Metadata-Flavor") == "Google"

    def poll(self, wait_s: float) -> Notice | None:
        wait_s = max(1, round(wait_s))
        url = f"{self.url}/preempted?wait_for_change=true&timeout_sec={wait_s}&last_etag={self.etag}"
        answer = _require_ok(request(url, {"Metadata-Flavor": "Google"}, wait_s=wait_s), url)
        notice = gcp_preempted(answer.body, time.time())
        self.etag = answer.headers.get("ETag", "0")
        return notice


class Azure:
    """Azure's scheduled events. The first question switches them on for the machine, which may take two minutes."""

    name = "azure"
    waits = False

    def __init__(self, endpoint: str) -> None:
        self.url = f"{endpoint}/metadata"
        self.machine: str | None = None

    def answers(self) -> bool:
        return self._name().status == 200

    def poll(self, wait_s: float) -> Notice | None:
        if self.machine is None:
            self.machine = _require_ok(self._name(), f"{self.url}/instance").body.strip()
        url = f"{self.url}/scheduledevents?api-version=2020-07-01"
        answer = _require_ok(request(url, {"Metadata": "true"}), url)
        return azure_scheduled_events(answer.body, self.machine, time.time())

    def _name(self) -> Answer:
        return request(f"{self.url}/instance/compute/name?api-version=2021-02-01&format=text", {"Metadata": "true"})


CLOUDS: dict[str, Callable[[str], Metadata]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}
