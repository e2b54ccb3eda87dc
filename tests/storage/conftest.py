"""An S3 server behind a proxy, and the variables by which it is found."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from moto.server import ThreadedMotoServer
from support.s3_proxy import Proxy

from neo_megatron.storage import object_reads, object_requests


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port())
    yield proxy
    proxy.shutdown()
    proxy.server_close()  # else who still has its address would wait for an answer
    server.stop()


@pytest.fixture(autouse=True)
def settings(proxy, monkeypatch, tmp_path) -> Callable[..., None]:
    """Sets environment variables for the library and this package, as a user does; open connections are forgotten."""

    def set_(**variables: Any) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value)) if value is not None else monkeypatch.delenv(name, raising=False)
        object_requests._connection_of.cache_clear()
        object_reads._reads_of.cache_clear()

    proxy.reset()
    # Pauses between repetitions are a constant, and too long for a test.
    monkeypatch.setattr(object_requests, "_FIRST_WAIT", 0.05)
    for name in list(os.environ):
        if name.startswith(("AWS_", "MSC_")):
            monkeypatch.delenv(name)
    set_(
        HOME=tmp_path,
        AWS_ENDPOINT_URL=proxy.url,
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        NEO_CACHE_DIR=tmp_path / "cache",
        # A busy machine may take seconds for an answer: a test whose server stalls asks for a shorter wait itself.
        NEO_STORAGE_TIMEOUT=20,
        NEO_STORAGE_RETRY_SECONDS=60,
    )
    yield set_
    proxy.released.set()
    object_requests._connection_of.cache_clear()
