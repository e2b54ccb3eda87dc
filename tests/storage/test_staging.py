"""Local room for files on their way to object storage."""

import re
import tempfile

import pytest

from neo_megatron.errors import DataError
from neo_megatron.storage.staging import Staging, staging_directory, staging_path

PLACE = "s3://bucket/shards"


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_one_run_at_a_time_and_nothing_is_left(tmp_path):
    first = Staging(PLACE)
    (first.directory / "file").touch()
    Staging("s3://bucket/others").close()
    with pytest.raises(DataError, match=f"another run is writing to {re.escape(PLACE)}; wait"):
        Staging(PLACE + "/")
    first.close()
    assert not any(tmp_path.iterdir())
    Staging(PLACE).close()


def test_what_a_killed_run_left_is_removed():
    room = staging_directory(PLACE) / "slice"
    room.mkdir()
    (room / "00000.tokens.bin").write_bytes(b"1234")
    staging = Staging(PLACE)
    assert not any(staging.directory.iterdir())
    staging.close()


def test_a_directory_of_others_is_not_used(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    staging_path(PLACE).symlink_to(elsewhere)
    with pytest.raises(DataError, match="belongs to another user; remove it, or set TMPDIR"):
        Staging(PLACE)


def test_others_cannot_look_into_it():
    assert staging_directory(PLACE).stat().st_mode & 0o77 == 0
