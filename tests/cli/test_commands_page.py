"""docs/commands.md is what `--help` of every command prints."""

from support.paths import ROOT, TOOLS
from support.processes import run_python

from neo_megatron.cli.commands import COMMANDS

IMPORTABLE = {"PYTHONPATH": str(ROOT)}


def test_the_page_is_up_to_date(tmp_path):
    done = run_python(TOOLS / "write_commands.py", "--output", tmp_path / "commands.md", environment=IMPORTABLE)
    assert done.returncode == 0, done.stdout
    page = (tmp_path / "commands.md").read_text()
    assert all(f"\nusage: neo-megatron {name}" in page for name in COMMANDS if name != "pretrain")
    assert (ROOT / "docs" / "commands.md").read_text() == page, "run python tools/write_commands.py"
