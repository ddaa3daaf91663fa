"""An S3 server on this machine."""

import socket
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from moto.server import ThreadedMotoServer


class Store:
    """A server that can be stopped and started again with what it holds."""

    def __init__(self):
        with closing(socket.create_server(("127.0.0.1", 0))) as probe:
            self.port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def new_bucket(self) -> str:
        """The URI of a storage in it, as a user would write it."""
        where = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&allow_bucket_creation=true"
        return f"s3://{uuid.uuid4().hex}/out?{where}"


@contextmanager
def running_store() -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        store = Store()
        yield store
        store.stop()
