"""The watcher of spot notices, against servers that speak the clouds' metadata protocols, and against a real GCS."""

import json
import logging
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import cloud_notices, notice_watcher
from cluster.cloud_notices import Aws, Azure, Gcp, MetadataError, Notice
from cluster.notice_watcher import WatcherError, watch
from nanochat_ray.bench.spot_cluster import spot_cluster
from tests.metadata_servers import AwsService, AzureService, GcpService, serving

ROOT = Path(__file__).parents[1]
POLL_S = 0.02
SOON = "2099-01-01T00:00:00Z"
SOON_S = datetime(2099, 1, 1, tzinfo=UTC).timestamp()
TERMINATE = {"action": "terminate", "time": SOON}

moments = st.datetimes(
    min_value=datetime(1990, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.timezones() | st.just(UTC)
)
texts = st.text(max_size=30) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["action", "time", "noticeTime", "Events", "EventType", "NotBefore", "Resources"]), inner
        )
    ),
).map(json.dumps)


@pytest.fixture
def aws():
    with serving(AwsService()) as service:
        yield service


@pytest.fixture
def gcp():
    with serving(GcpService()) as service:
        yield service


@pytest.fixture
def azure():
    with serving(AzureService()) as service:
        yield service


def later(action, seconds: float = 0.1) -> None:
    threading.Timer(seconds, action).start()


# What an answer means.


@given(moments)
def test_an_aws_action_gives_its_time_as_deadline(moment):
    notice = cloud_notices.aws_instance_action(json.dumps({"action": "stop", "time": moment.isoformat()}))
    assert notice.deadline == moment.timestamp()
    assert notice.certain


@given(st.lists(st.tuples(moments, st.booleans(), st.booleans()), max_size=5))
def test_azures_earliest_preemption_of_this_machine_counts_and_nothing_else(events):
    body = json.dumps(
        {
            "Events": [
                {
                    "EventType": "Preempt" if preempts else "Reboot",
                    "Resources": ["other", "this"] if ours else ["other", "this_2"],
                    "NotBefore": format_datetime(moment.astimezone(UTC), usegmt=True),
                }
                for moment, preempts, ours in events
            ]
        }
    )
    notice = cloud_notices.azure_scheduled_events(body, "this", now=0.0)
    times = [int(moment.timestamp()) for moment, preempts, ours in events if preempts and ours]
    assert (notice.deadline if notice else None) == (min(times) if times else None)


def test_an_azure_event_that_has_begun_has_its_deadline_now():
    body = json.dumps({"Events": [{"EventType": "Preempt", "Resources": ["this"], "NotBefore": ""}]})
    assert cloud_notices.azure_scheduled_events(body, "this", now=7.0) == Notice(True, "Azure preempts this", 7.0)


def test_gcp_gives_thirty_seconds_from_now():
    assert cloud_notices.gcp_preempted("FALSE", now=100.0) is None
    assert cloud_notices.gcp_preempted("TRUE\n", now=100.0).deadline == 130.0


@given(texts)
def test_any_other_answer_is_a_metadata_error_that_shows_it(body):
    for parse in (
        cloud_notices.aws_instance_action,
        cloud_notices.aws_rebalance,
        lambda text: cloud_notices.gcp_preempted(text, 0.0),
        lambda text: cloud_notices.azure_scheduled_events(text, "this", 0.0),
    ):
        refused = ""
        try:
            parse(body)
        except MetadataError as error:
            refused = str(error)
        assert not refused or repr(body[:200]) in refused


def test_a_time_without_its_zone_is_not_guessed():
    with pytest.raises(MetadataError, match="instance-action"):
        cloud_notices.aws_instance_action('{"action": "terminate", "time": "2099-01-01T00:00:00"}')
    west = datetime(2099, 1, 1, tzinfo=timezone(timedelta(hours=-8)))
    action = json.dumps({"action": "terminate", "time": west.isoformat()})
    assert cloud_notices.aws_instance_action(action).deadline == SOON_S + 8 * 3600


# How it is asked for.


def test_aws_is_asked_with_a_token_until_there_is_an_action(aws):
    later(lambda: aws.items.update({"spot/instance-action": TERMINATE}))
    drained = []
    notice = watch(Aws(aws.url), drained.append, POLL_S)
    assert notice == Notice(True, "AWS will terminate this machine", SOON_S)
    assert drained == [notice]
    assert aws.tokens_given == 1
    assert len(aws.asked) > 4


def test_an_expired_aws_token_is_renewed_without_losing_a_poll(aws):
    metadata = Aws(aws.url)
    assert metadata.poll(POLL_S) is None
    aws.tokens.clear()
    aws.items["spot/instance-action"] = TERMINATE
    assert metadata.poll(POLL_S).deadline == SOON_S
    assert aws.tokens_given == 2


def test_a_machine_whose_metadata_are_switched_off_says_so(aws):
    aws.broken = 403
    with pytest.raises(MetadataError, match="api/token answered 403"):
        Aws(aws.url).poll(POLL_S)


def test_a_rebalance_recommendation_is_logged_once_and_drains_nothing(aws, caplog):
    caplog.set_level(logging.INFO)
    aws.items["events/recommendations/rebalance"] = {"noticeTime": SOON}
    later(lambda: aws.items.update({"spot/instance-action": TERMINATE}), 0.2)
    drained = []
    watch(Aws(aws.url), drained.append, POLL_S)
    assert [notice.certain for notice in drained] == [True]
    assert sum("recommends to leave" in line for line in caplog.messages) == 1


def test_with_the_flag_a_recommendation_drains_and_the_notice_then_brings_its_deadline(aws):
    aws.items["events/recommendations/rebalance"] = {"noticeTime": SOON}
    later(lambda: aws.items.update({"spot/instance-action": TERMINATE}), 0.2)
    drained = []
    watch(Aws(aws.url), drained.append, POLL_S, drain_on_rebalance=True)
    assert [notice.deadline for notice in drained] == [None, SOON_S]


def test_gcps_notice_arrives_while_the_answer_is_awaited(gcp):
    later(lambda: gcp.set("TRUE"), 0.3)
    started = time.time()
    notice = watch(Gcp(gcp.url), lambda _: None, poll_s=20)
    assert time.time() - started < 10
    assert notice.deadline == pytest.approx(started + 30, abs=10)
    assert len(gcp.asked) == 2  # the value as it is, and its change


def test_azure_is_never_told_to_go_ahead(azure):
    others = {"EventType": "Preempt", "Resources": ["worker_30"], "NotBefore": "Mon, 19 Sep 2016 18:29:47 GMT"}
    ours = {"EventType": "Preempt", "Resources": ["worker_3"], "NotBefore": "Thu, 01 Jan 2099 00:00:00 GMT"}
    azure.events.append(others)
    later(lambda: azure.events.append(ours))
    assert watch(Azure(azure.url), lambda _: None, POLL_S).deadline == SOON_S
    assert all(question.startswith("GET ") for question in azure.asked)


@pytest.mark.parametrize("trouble", ["closed", "error", "silence"])
def test_a_service_in_trouble_is_asked_again_and_logged_once(aws, caplog, monkeypatch, trouble):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cloud_notices, "HTTP_TIMEOUT_S", 0.2)
    metadata = Aws(aws.url)
    assert metadata.poll(POLL_S) is None
    if trouble == "silence":
        aws.silent_s = 0.5
    else:
        aws.broken = {"closed": 0, "error": 500}[trouble]

    def recover() -> None:
        aws.silent_s, aws.broken = 0.0, None
        aws.items["spot/instance-action"] = TERMINATE

    later(recover, 0.7)
    assert watch(metadata, lambda _: None, POLL_S).deadline == SOON_S
    assert sum("trying again every" in line for line in caplog.messages) == 1
    assert sum("answers again" in line for line in caplog.messages) == 1


def test_metadata_never_go_through_a_proxy(aws, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert Aws(aws.url).poll(POLL_S) is None


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_the_cloud_is_found_by_who_answers(cloud, request):
    service = request.getfixturevalue(cloud)
    assert notice_watcher.detect_cloud(service.url).name == cloud


def test_where_no_cloud_answers_the_program_says_so_in_one_line(capsys):
    assert notice_watcher.main(["--endpoint", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err == (
        "error: no cloud's metadata service answers at http://127.0.0.1:9; if this is a spot machine, give --cloud\n"
    )


@pytest.mark.parametrize("flags", [["--cloud", "other"], ["--poll", "0"], ["--poll", "nan"], ["--poll", "soon"]])
def test_wrong_usage_exits_with_two(flags):
    with pytest.raises(SystemExit) as stop:
        notice_watcher.main(flags)
    assert stop.value.code == 2


# What is done about it.


class Refusing:
    """Takes the notice at the `after`-th try."""

    def __init__(self, after: int) -> None:
        self.after, self.tries = after, 0

    def __call__(self, notice: Notice) -> None:
        self.tries += 1
        if self.tries <= self.after:
            raise WatcherError("the head restarts")


def test_a_head_that_restarts_is_told_again_before_the_deadline(aws, monkeypatch):
    monkeypatch.setattr(notice_watcher, "RETRY_S", 0.02)
    aws.items["spot/instance-action"] = TERMINATE
    drain = Refusing(after=3)
    watch(Aws(aws.url), drain, POLL_S)
    assert drain.tries == 4


def test_after_the_deadline_it_gives_up_with_the_last_reason(aws, monkeypatch):
    monkeypatch.setattr(notice_watcher, "RETRY_S", 0.02)
    deadline = datetime.fromtimestamp(time.time() + 0.3, UTC).isoformat()
    aws.items["spot/instance-action"] = {"action": "terminate", "time": deadline}
    drain = Refusing(after=10**6)
    with pytest.raises(WatcherError, match="the head restarts"):
        watch(Aws(aws.url), drain, POLL_S)
    assert drain.tries > 2


@pytest.mark.ray
def test_a_notice_drains_the_machines_own_ray_node_with_its_deadline(aws):
    with spot_cluster(machines=2) as nodes:
        mine, _ = nodes.machines
        for machine in nodes.machines:
            nodes.occupy(machine)
        pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": nodes.environment}
        watcher = [sys.executable, "-m", "cluster.notice_watcher", "--cloud", "aws", "--endpoint", aws.url]
        watcher += ["--address", nodes.address, "--poll", "0.1"]
        lost = subprocess.run(watcher, stderr=subprocess.PIPE, timeout=60, **pipes)
        assert lost.returncode == 1  # simulated machines share one address
        assert "has 3 nodes at" in lost.stderr
        assert mine in lost.stderr

        process = subprocess.Popen([*watcher, "--node-id", mine], **pipes)
        try:
            assert f"watching aws for Ray node {mine}" in process.stdout.readline()
            assert nodes.draining() == {}
            deadline = time.time() + 4
            action = {"action": "terminate", "time": datetime.fromtimestamp(deadline, UTC).isoformat()}
            aws.items["spot/instance-action"] = action
            assert "AWS will terminate this machine" in process.stdout.readline()
            assert "drained" in process.stdout.readline()
            assert nodes.draining() == {mine: round(deadline * 1000)}
            assert process.wait(timeout=30) == 0
            assert time.time() >= deadline
        finally:
            process.kill()
            process.wait()
