"""Credentials are never printed or written."""

import json

import pytest
from support.paths import GOLDEN, TOOLS
from support.processes import run_forked

from neo_megatron.command_line import sentence_of
from neo_megatron.errors import DataError, Reason, RejectedSample
from neo_megatron.paths import Wanted, WrongPath, check_path
from neo_megatron.redaction import redacted
from neo_megatron.storage.open import open_directory

SECRETS = ("hunter2", "SECRET")
KEY = "AKIA" + "A1" * 8
TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:hunter2@host/a.png?X-Amz-Signature=SECRET&b=c is gone", "https://***@host/a.png?*** is gone"),
        ("'s3://KEY:SECRET@bucket/a' and 's3://bucket/a?token=SECRET'", "'s3://***@bucket/a' and 's3://bucket/a?***'"),
        (f"key {KEY}, token {TOKEN}.", "key ***, token ***."),
        ("glpat-SECRETSECRETSECRET1", "***"),
        ("who@example.org asks: 1 ? 2 : 3 at https://host/a.png", None),
        ("/data/a?b=c/image@2x.png, s3://bucket/image@2x.png", None),
    ],
)
def test_secrets_are_redacted(text, shown):
    assert redacted(text) == (text if shown is None else shown)


def test_errors_and_rejects_are_redacted():
    text = f"https://u:hunter2@host/a?sig=SECRET {KEY}"
    rejected = RejectedSample(Reason.REMOTE_PATH, text)
    told = [sentence_of(DataError(text)), rejected.sentence, rejected.row("a.json", 0, None)["reason"], str(rejected)]
    assert not any(secret in line for line in told for secret in (*SECRETS, KEY))


@pytest.mark.parametrize("address", ["s3://KEY:hunter2@bucket/x", "s3://bucket/x?token=hunter2", "msc://a:hunter2@p/x"])
def test_addresses_with_credentials_are_rejected(address):
    """They would be stored in manifests."""
    for refuse in (open_directory, lambda address: check_path(address, Wanted.SHARDS, "--data")):
        with pytest.raises((DataError, WrongPath), match="has credentials in it, .* set AWS_ACCESS_KEY_ID") as refused:
            refuse(address)
        assert "hunter2" not in str(refused.value)


def test_outputs_of_tools_have_no_secrets(tmp_path):
    images = ["https://user:hunter2@host/a.png?X-Amz-Signature=SECRET", "s3://KEY:SECRET@bucket/a.png", f"{TOKEN}.png"]
    talk = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yes"}]
    (tmp_path / "a.json").write_text(json.dumps([{"image": image, "conversations": talk} for image in images]))
    words = ["--input", tmp_path / "a.json", "--image-root", tmp_path, "--tokenizer", GOLDEN / "tokenizer"]
    secrets = {"AWS_SECRET_ACCESS_KEY": "SECRET1", "HF_TOKEN": "SECRET2", "WANDB_API_KEY": "SECRET3"}
    words += ["--output", tmp_path / "out", "--max-rejected", "100"]
    done = run_forked(TOOLS / "preprocess_data.py", *words, environment=secrets)
    left = [done.stdout, *(path.read_bytes().decode("latin-1") for path in (tmp_path / "out").iterdir())]
    assert "rejected 3" in done.stdout and len(left) > 2
    assert not any(secret in text for text in left for secret in (*SECRETS, TOKEN))
