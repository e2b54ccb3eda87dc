"""Old names of flags still work, and say on stderr what to write instead."""

import sys

import pytest

from neo_megatron.cli.plan import parse_arguments


@pytest.mark.parametrize(
    ("flags", "expected", "note"),
    [
        ([], 0.85, ""),
        (["--image-share", "0.5"], 0.5, ""),
        (["--picture-share", "0.5"], 0.5, "plan: --picture-share is deprecated; use --image-share\n"),
    ],
)
def test_picture_share_is_image_share(monkeypatch, capsys, flags, expected, note):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--neo-model", "tiny", *flags])
    assert parse_arguments().image_share == expected
    assert capsys.readouterr().err == note


def test_help_lists_the_new_name_only(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--help"])
    with pytest.raises(SystemExit):
        parse_arguments()
    text = capsys.readouterr().out
    assert "--image-share" in text and "--picture-share" not in text
