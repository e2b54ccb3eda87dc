"""The files around the code agree with it: version, workflows, containers, links and quoted error messages."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from distutils.core import run_setup  # setuptools provides it

import neo_megatron

ROOT = Path(__file__).parents[1]
LINT = ROOT / "tests" / "lint.sh"
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/containers.md", "docs/troubleshooting.md")
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def read(name: str) -> str:
    return (ROOT / name).read_text()


@cache
def distribution():
    return run_setup(str(ROOT / "setup.py"), stop_after="init")


class TestVersion:
    def test_setup_py_has_the_version_of_the_package(self):
        assert distribution().get_version() == neo_megatron.__version__

    def test_the_changelog_begins_with_it(self):
        assert re.findall(r"(?m)^## \[(.+?)\]", read("CHANGELOG.md"))[0] == neo_megatron.__version__

    def test_the_citation_has_it(self):
        assert yaml.safe_load(read("CITATION.cff"))["version"] == neo_megatron.__version__

    def test_no_other_file_repeats_it(self):
        assert f'"{neo_megatron.__version__}"' not in read("setup.py") + read("pyproject.toml")


class TestMetadata:
    def test_addresses_begin_with_one_constant(self):
        url = distribution().get_url()
        assert all(address.startswith(url) for address in distribution().metadata.project_urls.values())

    def test_other_files_use_the_same_address(self):
        url = distribution().get_url()
        for name in ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", ".github/ISSUE_TEMPLATE/config.yml"):
            assert url in read(name), name

    def test_the_type_marker_is_in_the_wheel(self):
        assert "py.typed" in distribution().package_data["neo_megatron"]
        assert (ROOT / "neo_megatron" / "py.typed").is_file()


class TestWorkflows:
    @pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
    def test_workflows_are_yaml(self, path):
        assert isinstance(yaml.safe_load(path.read_text()), dict)

    def test_ci_runs_the_commands_of_the_readme_and_the_linters(self):
        jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
        commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
        assert commands == {"bash tests/lint.sh", "bash tests/run.sh", "bash examples/quickstart/run.sh"}
        for command in commands - {"bash tests/lint.sh"}:
            assert command in read("README.md")
        assert all((ROOT / command.split()[1]).is_file() for command in commands)

    def test_hooks_run_checks_that_lint_sh_has(self):
        hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
        names = {hook["entry"].removeprefix("bash tests/lint.sh ") for hook in hooks}
        assert names == set(re.search(r"set -- (.+)", LINT.read_text())[1].split())


class TestLint:
    def test_an_unknown_check_is_reported(self):
        done = lint("spelling")
        assert done.returncode == 1 and "spelling is not a check; choose from" in done.stdout

    def test_words_are_found_across_lines_and_names_on_disk_are_left_alone(self, tmp_path):
        page = tmp_path / "page.md"
        page.write_text("Stored in `pictures.bin`.\n\nIt stopped for want\nof memory; the\npicture is gone.\n")
        done = run(sys.executable, "tests/check_words.py", page)
        assert done.returncode == 1
        assert [line.removeprefix(str(page)) for line in done.stdout.splitlines()] == [
            ":3: for want of: use because there is no, or out of instead",
            ":5: picture: use image instead",
        ]


class TestContainers:
    @pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
    def test_locks_exist(self, path):
        text = path.read_text()
        choices = re.search(r"lock that is installed: (.+?)\.", text)[1]
        locks = {*re.split(r", | or ", choices), re.search(r"(?m)^ARG LOCK=(\w+)", text)[1]}
        assert len(locks) == 3
        assert all((ROOT / "tools" / "locks" / f"{lock}.lock").is_file() for lock in locks)

    def test_the_gpu_image_keeps_its_own_pytorch(self):
        program = re.search(r"awk '([^']+)'", read("docker/Dockerfile.gpu"))[1]
        done = run("awk", program, "tools/locks/quickstart.lock")
        kept = set(re.findall(r"(?m)^([\w.-]+)==", done.stdout))
        locked = set(re.findall(r"(?m)^([\w.-]+)==", read("tools/locks/quickstart.lock")))
        dropped = locked - kept
        assert {"torch", "triton"} < dropped
        assert all(name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-")) for name in dropped)
        entries = re.split(r"(?m)^(?=\S)", done.stdout)[1:]
        assert len(entries) == len(kept) and all("--hash=sha256:" in entry for entry in entries)

    def test_the_page_has_the_commands_of_the_dockerfiles(self):
        for path in DOCKERFILES:
            command = re.search(r"docker build .+", path.read_text())[0]
            assert command in read("docs/containers.md")


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_lead_to_files(name):
    page = ROOT / name
    targets = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    for path, anchor in targets:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)", target.read_text())
            assert anchor in {re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", "-") for text in headings}, (
                anchor
            )


def test_contributing_names_files_that_exist():
    named = re.findall(r"`((?:tests|tools|docs|examples|docker)/[\w./-]+\.\w+)`", read("CONTRIBUTING.md"))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_troubleshooting_quotes_what_the_code_prints():
    literals = "\n".join(sorted(source_literals()))
    quoted = re.findall(r"(?m)^\| `([^`]+)` \|", read("docs/troubleshooting.md"))
    assert len(quoted) >= 25
    wrong = [
        piece
        for sentence in quoted
        for piece in re.split(r"\b[A-Z][A-Z0-9_/-]*\b|…|[,:;] |s3:|--", sentence)
        if len(piece.strip(" .,()")) >= 14 and piece.strip(" .,()") not in literals
    ]
    assert wrong == []


def source_literals() -> set[str]:
    """The text of all string literals of the package and the commands, with formatted values cut out."""
    return {
        node.value
        for folder in ("neo_megatron", "tools", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if "out" not in path.relative_to(ROOT).parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def lint(check: str) -> subprocess.CompletedProcess[str]:
    return run("bash", LINT, check)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "LINT_PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
