"""The clouds' metadata services as a machine sees them, on a loopback port, with knobs for what goes wrong."""

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Service(ABC):
    """What the next questions are answered with; `asked` lists the questions."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken: int | None = None  # answer everything with this status; 0 closes the connection
        self.silent_s = 0.0  # wait before any answer
        self.url = ""

    @abstractmethod
    def answer(self, method: str, path: str, query: dict[str, str], headers: Any) -> tuple[int, dict[str, str], str]:
        """Status, headers and body."""


class AwsService(Service):
    """IMDSv2: 401 without a valid token, 404 for what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.items: dict[str, Any] = {}
        self.tokens: set[str] = set()
        self.tokens_given = 0

    def answer(self, method, path, query, headers):
        if path == "/latest/api/token":
            if method != "PUT" or not headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").isdigit():
                return 400, {}, "PUT with a lifetime, please"
            self.tokens_given += 1
            token = f"token{self.tokens_given}"
            self.tokens.add(token)
            return 200, {}, token
        if headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return 401, {}, "<html>Unauthorized</html>"
        item = path.removeprefix("/latest/meta-data/")
        return (200, {}, json.dumps(self.items[item])) if item in self.items else (404, {}, "<html>Not Found</html>")


class GcpService(Service):
    """Compute Engine: 403 without its header, and answers that wait for a change."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()
        self.preempted = "FALSE"

    def set(self, preempted: str) -> None:
        with self.changed:
            self.preempted = preempted
            self.changed.notify_all()

    def answer(self, method, path, query, headers):
        if headers.get("Metadata-Flavor") != "Google" or method != "GET":
            return 403, {}, "Forbidden"
        flavor = {"Metadata-Flavor": "Google"}
        if path == "/computeMetadata/v1/instance/id":
            return 200, flavor, "4711"
        if path != "/computeMetadata/v1/instance/preempted":
            return 404, flavor, "Not Found"
        with self.changed:
            if query.get("wait_for_change") == "true":
                same = lambda: query["last_etag"] == f"etag-{self.preempted}"  # noqa: E731
                self.changed.wait_for(lambda: not same(), timeout=float(query["timeout_sec"]))
            return 200, {**flavor, "ETag": f"etag-{self.preempted}"}, self.preempted


class AzureService(Service):
    """Scheduled events: 400 without its header."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def answer(self, method, path, query, headers):
        if headers.get("Metadata") != "true" or "api-version" not in query:
            return 400, {}, '{"error": "Bad request. Required metadata header not specified"}'
        if path == "/metadata/instance/compute/name":
            return 200, {}, "worker_3"
        if path == "/metadata/scheduledevents" and method == "GET":
            return 200, {}, json.dumps({"DocumentIncarnation": len(self.events), "Events": self.events})
        return 404, {}, ""


@contextmanager
def serving(service: Service) -> Iterator[Service]:
    """The service, answering at `service.url` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            place = urlsplit(self.path)
            service.asked.append(f"{self.command} {place.path}")
            time.sleep(service.silent_s)
            if service.broken == 0:
                self.close_connection = True
                return
            query = {name: values[0] for name, values in parse_qs(place.query).items()}
            status, headers, body = service.answer(self.command, place.path, query, self.headers)
            if service.broken is not None:
                status, headers, body = service.broken, {}, "<html>oh no</html>"
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = do_POST = do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
