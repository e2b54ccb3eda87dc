"""JSON that breaks its reader, and FIFOs in place of files, are a sentence with the file."""

import os
import shutil

import pytest
from support.paths import GOLDEN

from neo_megatron.checked_files import read_json
from neo_megatron.checkpoint.neo_directory import open_neo
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError
from neo_megatron.paths import Kind, kind_of

DEEP = b'{"a": ' * 100_000
BROKEN = {
    "deep": DEEP,
    "deep and closed": DEEP + b"1" + b"}" * 100_000,
    "long number": b'{"a": 1' + b"0" * 5000 + b"}",
    "no UTF-8": b'{"a": "\xff"}',
    "cut": b'{"a": ',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_broken_json_is_refused_in_one_sentence(text, tmp_path):
    for name in ("config.json", "manifest.json"):
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json: not JSON .*: copy or download it again"):
        read_json(tmp_path / "config.json")
    for read in (ShardSet, verify):
        with pytest.raises(DataError, match=r"manifest\.json is damaged .* write the data set again"):
            read(str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    assert kind_of(tmp_path) is Kind.OTHER_MODEL


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_fifo_does_not_block(name, tmp_path):
    shutil.copytree(GOLDEN / "ckpt_untied", tmp_path / "neo")
    (tmp_path / "neo" / name).unlink()
    os.mkfifo(tmp_path / "neo" / name)
    with pytest.raises(ValueError, match="neo"):
        open_neo(tmp_path / "neo")
