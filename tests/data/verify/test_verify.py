"""`neo-megatron verify-data` finds damage of every kind in every file, and lists all of it."""

import dataclasses
import io
import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neo_megatron.atomic_files import write_atomically
from neo_megatron.data.manifest import write_manifest
from neo_megatron.data.packs.writer import HeldOut, PackInput, write_packs
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError

SHARD_FILES = [
    *(f"00000.{kind}.{suffix}" for kind in ("tokens", "spans", "pictures") for suffix in ("bin", "idx")),
    *("00000.grids.npy", "00000.samples.npy", "00000.media.npy"),
]
PACK_FILES = ["units.npy", "patterns.npy", "runs.npy"]


@pytest.fixture
def records(new_sample) -> list:
    """Text, a list-packed record, several images, and two records that are rejected."""
    return [
        new_sample("<image>", "one", image="a.png"),
        [new_sample("two", "three"), new_sample("four", "five", image="b.png")],
        new_sample("<image> and <image>", "six", image=["b.png", "a.png"]),
        new_sample("<image>", "gone", image="missing.png"),
        new_sample("seven", "eight", "nine", "ten"),
        {"conversations": []},
    ]


@pytest.fixture(params=["encoded", "patches"])
def shards(request, bench, records) -> Path:
    """Two shards."""
    bench.images("a.png", "b.png")
    settings = dataclasses.replace(bench.settings, records_per_shard=3, image_store=request.param)
    return Path(bench.preprocess(records, settings=settings).location)


@pytest.fixture
def packs(bench, records) -> Path:
    """Packs of a list-packed data set without over-long samples."""
    bench.images("a.png", "b.png")
    bench.preprocess(records)
    write_packs([PackInput(str(bench.path / "shards"))], bench.path / "packs", 64)
    return bench.path / "packs"


def flip(path: Path, place: int) -> None:
    """Changes one bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def read(directory: Path) -> dict:
    """A manifest without its own checksum, which ``write_manifest`` adds."""
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["sha256"]
    return manifest


def rewrite(directory: Path, shard: int, name: str, content: bytes) -> None:
    """Replaces a file of a shard together with its checksum: the result of a faulty writer."""
    manifest = read(directory)
    manifest["shards"][shard]["files"][name] = write_atomically(directory / name, content)
    write_manifest(directory, manifest)


def array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def found(directory: Path) -> list[tuple[str, str]]:
    return [(damage.file, damage.sentence) for damage in verify(directory).damage]


def test_an_intact_data_set_has_no_damage(shards):
    result = verify(shards)
    assert result.damage == [] and result.notes == []
    files = [path for path in shards.iterdir() if path.name not in ("manifest.json", "rejects.jsonl")]
    assert (result.files, result.bytes) == (len(files) + 2, sum(path.stat().st_size for path in files))
    assert (result.samples, result.images) == (5, 4)


@pytest.mark.parametrize("name", SHARD_FILES)
@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_is_reported_with_its_file(shards, name, place):
    flip(shards / name, place)
    assert name in {file for file, _ in found(shards)}


def test_a_flipped_bit_is_reported_for_its_shard(shards):
    flip(shards / "00001.tokens.bin", 0)
    assert {file for file, _ in found(shards)} == {"00001.tokens.bin"}


def test_every_flipped_bit_of_the_manifest_is_found(shards):
    text = (shards / "manifest.json").read_bytes()
    for place in range(0, len(text), 7):
        changed = bytearray(text)
        changed[place] ^= 1
        (shards / "manifest.json").write_bytes(changed)
        try:
            files = [file for file, _ in found(shards)]
        except DataError as error:
            files = [str(error)]
        assert "manifest.json" in files[0], place


def test_a_flipped_bit_of_the_list_of_rejects_is_found(shards):
    for place in (0, (shards / "rejects.jsonl").read_bytes().index(b'"kind": "') + 10):
        original = (shards / "rejects.jsonl").read_bytes()
        flip(shards / "rejects.jsonl", place)
        assert {file for file, _ in found(shards)} == {"rejects.jsonl"}
        (shards / "rejects.jsonl").write_bytes(original)


@pytest.mark.parametrize("name", ["00000.tokens.bin", "00000.pictures.bin", "00000.samples.npy", "rejects.jsonl"])
def test_truncated_and_missing_files_are_reported(shards, name):
    (shards / name).write_bytes((shards / name).read_bytes()[:-2])
    assert {file for file, _ in found(shards)} == {name}
    (shards / name).unlink()
    assert (name, "it is missing") in found(shards)


def test_swapped_shards_are_reported_file_by_file(shards):
    for name in SHARD_FILES:
        other = shards / name.replace("00000", "00001")
        (shards / name).rename(shards / "aside")
        other.rename(shards / name)
        (shards / "aside").rename(other)
    assert {file for file, _ in found(shards)} == {
        *SHARD_FILES,
        *(name.replace("00000", "00001") for name in SHARD_FILES),
    }


def test_all_damage_is_listed_in_one_order_for_any_number_of_workers(shards):
    for name in ("00000.tokens.bin", "00001.spans.bin", "00000.grids.npy"):
        flip(shards / name, -1)
    (shards / "00001.samples.npy").unlink()
    (shards / "stray.txt").touch()
    one, two = verify(shards, 1), verify(shards, 2)
    assert one == two
    assert {damage.file for damage in one.damage} == {
        *("00000.tokens.bin", "00001.spans.bin", "00000.grids.npy", "00001.samples.npy")
    }
    assert len(one.notes) == 1 and "stray.txt" in one.notes[0]


def test_a_token_outside_the_tokenizer_is_reported_with_its_sample(shards):
    flip(shards / "00000.tokens.bin", 3)  # the highest byte of the first token
    sentences = [sentence for file, sentence in found(shards) if file == "00000.tokens.bin"]
    assert len(sentences) == 2
    assert "sample 0 (" in sentences[1] and "train.json, record 0)" in sentences[1] and "16778" in sentences[1]


@pytest.mark.parametrize("shards", ["encoded"], indirect=True)
def test_a_broken_image_with_a_correct_checksum_is_reported(shards):
    """Which a data set with a header check may have."""
    content = bytearray((shards / "00000.pictures.bin").read_bytes())
    first = np.fromfile(shards / "00000.pictures.idx", np.uint8)[34:50].view("<i4")
    end = int(first[:3].sum())  # a, b, b: the second image of the shard's last sample but one is the third
    content[end - 400 : end] = bytes(400)
    rewrite(shards, 0, "00000.pictures.bin", bytes(content))
    [(file, sentence)] = found(shards)
    assert file == "00000.pictures.bin"
    assert "sample 3 (" in sentence and "train.json, record 2)" in sentence and "1 of 2" in sentence
    assert "copying does not help" in verify(shards).remedy()


@pytest.mark.parametrize("shards", ["encoded"], indirect=True)
def test_an_image_of_another_size_does_not_fit_its_grid(shards, bench):
    content = (shards / "00000.pictures.bin").read_bytes()
    length = int(np.fromfile(shards / "00000.pictures.idx", np.uint8)[34:38].view("<i4")[0])
    file = io.BytesIO()
    Image.new("RGB", (200, 20)).save(file, "PNG")
    other = file.getvalue() + bytes(length - len(file.getvalue()))  # viewers and Pillow ignore what follows the end
    rewrite(shards, 0, "00000.pictures.bin", other + content[length:])
    [(file, sentence)] = found(shards)
    assert "record 0" in sentence and "grid" in sentence


def change(dtype: str, place: int, value: int):
    """Changes a number in a file."""

    def apply(content: bytes) -> bytes:
        number = np.array([value], dtype).tobytes()
        start = place % len(content)
        return content[:start] + number + content[start + len(number) :]

    return apply


@pytest.mark.parametrize(
    "kind, applied, words",
    [
        ("tokens.bin", change("<i4", 0, 896), "<IMG_CONTEXT>"),
        ("tokens.bin", change("<i4", 0, 897), "<img>"),
        ("tokens.bin", change("<i4", 0, -1), "token -1"),
        ("spans.bin", change("<i4", 4, 1 << 20), "within the sample"),
        ("spans.bin", change("<i4", 0, 0), "within the sample"),
        ("tokens.idx", change("<i4", 34, 1), "contradict"),
        ("tokens.idx", change("<i8", 34 + 16 + 32 + 8, 5), "documents"),
        ("tokens.idx", change("<i8", 34 + 16 + 32 + 8, 2), "records"),
        ("pictures.idx", change("<i8", 34 + 12 * 4 + 8, 0), "images"),
        ("grids.npy", change("<i4", 128, 3), "even"),
        ("samples.npy", change("<i4", -4 * 28, 5), "source"),
        ("samples.npy", change("<i4", -4 * 28 + 12, 1), "trained"),
        ("samples.npy", lambda content: array_bytes(np.zeros(4)), "'<f8'"),
        ("samples.npy", lambda content: b"no array", "not a NumPy array"),
        ("media.npy", change("<i4", -20, 9), "not those of the shard"),
        ("media.npy", change("<i4", -20, 0), "not in order"),
        ("media.npy", change("<i4", -80, 1), "without images"),
    ],
)
@pytest.mark.parametrize("shards", ["encoded"], indirect=True)
def test_errors_of_a_faulty_writer_are_found_despite_correct_checksums(shards, kind, applied, words):
    name = f"00000.{kind}"
    rewrite(shards, 0, name, applied((shards / name).read_bytes()))
    result = verify(shards)
    assert any(words in damage.sentence for damage in result.damage)
    assert all(damage.kind == "content" for damage in result.damage)


def test_a_data_set_without_images_has_no_damage(bench, new_sample):
    assert verify(bench.preprocess([new_sample(), new_sample()]).location).damage == []


def test_contradictory_counts_are_reported(shards):
    manifest = read(shards)
    manifest["counts"]["samples_read"] += 1
    manifest["counts"]["rejected_by_reason"]["missing picture"] += 1
    write_manifest(shards, manifest)
    files = [(file, sentence) for file, sentence in found(shards)]
    assert [file for file, _ in files] == ["manifest.json", "manifest.json", "rejects.jsonl"]
    assert "samples_read" in files[0][1] and "missing picture" in files[2][1]


def test_intact_packs_have_no_damage(packs):
    assert verify(packs).damage == []


@pytest.mark.parametrize("name", PACK_FILES)
@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_in_a_file_of_packs_is_found(packs, name, place):
    flip(packs / name, place)
    assert [file for file, _ in found(packs)] == [name]


def test_packs_of_another_data_set_are_reported(packs, bench, new_sample):
    shutil.rmtree(bench.path / "shards")
    bench.preprocess([new_sample()])
    [(file, sentence)] = found(packs)
    assert file == "manifest.json" and "not the one that was packed" in sentence


def test_a_missing_data_set_of_packs_is_reported_with_other_damage(packs, bench):
    shutil.rmtree(bench.path / "shards")
    flip(packs / "runs.npy", -1)
    assert [file for file, _ in found(packs)] == ["runs.npy", "manifest.json"]


@pytest.mark.parametrize("share", [Fraction(1, 3), Fraction(1), Fraction(5, 2)])
def test_shares_and_over_long_samples_are_not_damage(bench, new_sample, share):
    texts = ["word " * (3 * number % 50) for number in range(60)]
    bench.preprocess([new_sample(text, "ok") for text in texts])
    inputs = [PackInput(str(bench.path / "shards"), share)]
    held_out = HeldOut(Fraction(1, 4), str(bench.path / "held_out"))
    train, held = write_packs(inputs, bench.path / "packs", 48, held_out=held_out)
    assert train["counts"]["samples_rejected"] and held["counts"]["samples_packed"]
    assert verify(bench.path / "packs").damage == verify(bench.path / "held_out").damage == []


def rewrite_unit(packs: Path, first: int, field: str, value: int) -> None:
    """Changes a field of the unit that begins with the given sample, and the checksum with it."""
    units = np.load(packs / "units.npy")
    units[field][units["first"] == first] = value
    manifest = read(packs)
    manifest["files"]["units.npy"] = write_atomically(packs / "units.npy", array_bytes(units))
    write_manifest(packs, manifest)


@pytest.mark.parametrize(
    "first, field, value, words",
    [
        (3, "first", 0, "packs of an epoch"),
        (3, "first", 1000, "no data set"),
        (3, "cells", 77, "image tokens, not 77"),
        (1, "squares", 1, "squared"),
        (1, "samples", 1, "tokens"),
        (4, "samples", 2, "does not end"),
        (4, "samples", 0, "does not end"),
    ],
)
def test_wrong_units_are_found(packs, first, field, value, words):
    """Samples 1 and 2 are of one record, and one unit."""
    rewrite_unit(packs, first, field, value)
    damage = verify(packs).damage
    assert any(words in entry.sentence for entry in damage), damage


def test_a_pack_that_is_too_long_is_found(packs):
    manifest = read(packs)
    runs = np.load(packs / "runs.npy")
    manifest["seq_length"] = int(runs["length"].max()) - 1
    write_manifest(packs, manifest)
    assert any("more than" in sentence for _, sentence in found(packs))


def test_the_tool_lists_all_damage_and_ends_with_the_remedy(shards, run_tool):
    clean = run_tool("verify_data.py", "--data", shards, "--workers", 1)
    assert clean.returncode == 0 and "5 samples" in clean.stdout and "is intact" in clean.stdout
    for name in ("00000.spans.bin", "00001.grids.npy"):
        flip(shards / name, -1)
    done = run_tool("verify_data.py", "--data", shards, "--workers", 1)
    assert done.returncode == 1
    assert "damaged: 00000.spans.bin: " in done.stdout and "damaged: 00001.grids.npy: " in done.stdout
    assert "copy the listed files" in done.stderr.splitlines()[-1]


def test_the_tool_reports_that_a_directory_is_not_a_data_set(tmp_path, run_tool):
    done = run_tool("verify_data.py", "--data", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "is an empty directory: give a directory that" in done.stderr
