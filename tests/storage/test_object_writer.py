"""Objects are complete, whatever the server does; a failure is one sentence with the object."""

import boto3
import pytest

from neo_megatron.errors import DataError
from neo_megatron.storage.object_writer import ObjectWriter


@pytest.fixture
def writer(proxy) -> ObjectWriter:
    host, port = proxy.server
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="written")
    writer = ObjectWriter("s3://written/some/shards/")
    writer.delete(list(writer.sizes()))
    return writer


def test_files_and_bytes_become_objects(writer, tmp_path):
    content = {"a.bin": b"", "b.bin": bytes(range(256)) * 100, "c.json": b"{}"}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    writer.upload([tmp_path / name for name in content])
    writer.write("d.json", b"[1]")
    ObjectWriter("s3://written/some/shards/below").write("e.json", b"")
    ObjectWriter("s3://written/some/shards-of-others").write("f.json", b"")
    assert writer.sizes() == {"a.bin": 0, "b.bin": 25600, "c.json": 2, "d.json": 3}
    assert dict(zip(content, writer.read(list(content), 1 << 20), strict=True)) == content
    writer.write("d.json", b"[1, 2]")
    assert writer.read(["d.json"], 99) == [b"[1, 2]"]
    writer.delete(["a.bin", "b.bin", "gone"])
    assert sorted(writer.sizes()) == ["c.json", "d.json"]
    assert ObjectWriter("s3://written/nothing").sizes() == {}


def test_a_failing_server_is_asked_again(writer, proxy):
    failures = iter([503, 500, None])
    proxy.fault = lambda request: next(failures, None) if request.command == "PUT" else None
    writer.write("a.json", b"complete")
    assert writer.read(["a.json"], 99) == [b"complete"]
    assert sum(method == "PUT" for method, _, _ in proxy.requests) >= 3


def test_what_does_not_help_is_one_sentence(writer, proxy, settings):
    proxy.fault = lambda request: 403 if request.command == "PUT" else None
    with pytest.raises(DataError, match=r"s3://written/some/shards/a.json may not be written .*s3:PutObject"):
        writer.write("a.json", b"")
    settings(NEO_STORAGE_RETRY_SECONDS=0.2)
    proxy.fault = lambda request: 500 if request.command == "PUT" else None
    with pytest.raises(DataError, match=r"a.json could not be written: the server answers 500 .*run the same command"):
        writer.write("a.json", b"")
    with pytest.raises(DataError, match="s3://no-such-bucket-here does not exist"):
        ObjectWriter("s3://no-such-bucket-here/x").sizes()
