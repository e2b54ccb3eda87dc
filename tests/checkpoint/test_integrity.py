"""A checkpoint that is not as it was written is noticed, whatever byte of whatever file differs."""

import random
import shutil

import pytest
import torch

from neo_megatron.checkpoint.dcp_metadata import CHECKSUMS, write_checksums
from neo_megatron.checkpoint.integrity import share_of, stored_pieces, verify_pieces
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory, write_torch_dist
from neo_megatron.errors import DamagedCheckpoint

SHAPES = {"weight": (40, 30), "bias": (3,), "embedding": (100, 8), "scalar": ()}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    directory = tmp_path_factory.mktemp("integrity") / "iter_0000002"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    stored = [StoredTensor(name, shape, torch.float32) for name, shape in SHAPES.items()]
    write_torch_dist(directory, stored, tensors.values(), {"args": None, "iteration": 2})
    write_checksums(directory)
    return directory


@pytest.fixture
def copy(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "copy")


def verify(directory):
    verify_pieces(stored_pieces(directory))


def contents(directory):
    checkpoint = TorchDistDirectory(directory)
    return {name: checkpoint.read(name) for name in SHAPES} | checkpoint.common_state()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in SHAPES) and one["iteration"] == other["iteration"]


def test_an_intact_checkpoint_passes(intact):
    verify(intact)


def test_every_flipped_bit_is_noticed_or_changes_nothing(intact, copy):
    """Padding between records is neither covered nor read; everything else is."""
    expected, choose = contents(intact), random.Random(1)
    noticed = 0
    for path in sorted(copy.iterdir()):
        original = path.read_bytes()
        for place in choose.sample(range(len(original)), min(len(original), 150)):
            data = bytearray(original)
            data[place] ^= 1 << choose.randrange(8)
            path.write_bytes(data)
            try:
                verify(copy)
            except DamagedCheckpoint as error:
                assert str(copy) in str(error) and "\n" not in str(error)
                noticed += 1
            else:
                assert path.suffix == ".distcp"
                assert same(contents(copy), expected), (path.name, place)
        path.write_bytes(original)
    assert noticed > 300


def test_every_missing_and_every_cut_file_is_noticed(copy):
    for path in sorted(copy.iterdir()):
        original = path.read_bytes()
        path.unlink()
        if path.name != CHECKSUMS:  # written by other programs, a checkpoint has none
            with pytest.raises(DamagedCheckpoint, match=path.name):
                verify(copy)
        for length in (0, 1, len(original) // 2, len(original) - 1):
            path.write_bytes(original[:length])
            with pytest.raises(DamagedCheckpoint, match=str(copy)):
                verify(copy)
        path.write_bytes(original)
    verify(copy)


def test_without_checksums_of_ours_the_tensors_are_still_verified(copy):
    (copy / CHECKSUMS).unlink()
    verify(copy)
    data = next(copy.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[content.index(b"archive/data/0") + 200] ^= 1
    data.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"distcp is damaged between bytes \d+ and \d+"):
        verify(copy)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_ranks_share_all_pieces(intact, ranks):
    pieces = stored_pieces(intact)
    shares = [share_of(pieces, rank, ranks) for rank in range(ranks)]
    assert sum(shares, []) == pieces
    most = max(piece.length for piece in pieces)
    mean = sum(piece.length for piece in pieces) / ranks
    assert all(sum(piece.length for piece in share) <= mean + most for share in shares)


def test_metadata_cannot_name_files_outside_the_directory(intact, copy):
    """`.metadata` names files; it may only name those next to it."""
    (copy / CHECKSUMS).unlink()
    data = next(copy.glob("*.distcp"))
    metadata = copy / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(data.name.encode(), b"../" + data.name.encode()[3:]))
    with pytest.raises(DamagedCheckpoint, match="which is not a file of this directory"):
        verify(copy)


def replace_in(path, old, new):
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def test_conversions_read_nothing_that_changed_since_it_was_written(copy):
    """Two tensors of one shape in each other's place: no record shows it, the checksum of `.metadata` does."""
    metadata = copy / ".metadata"
    saved = metadata.read_bytes()
    metadata.write_bytes(saved + b" ")
    with pytest.raises(ValueError, match=".metadata has another checksum than checksums.json says"):
        TorchDistDirectory(copy)
    metadata.write_bytes(saved)
    replace_in(next(copy.glob("*.distcp")), b"iteration", b"iterasion")
    with pytest.raises(ValueError, match="common_state/shard_0_1: the checksum of archive/data.pkl differs"):
        TorchDistDirectory(copy).common_state()


def test_a_damaged_pickle_of_a_tensor_is_one_sentence(copy):
    (data,) = copy.glob("*.distcp")
    replace_in(data, b"_rebuild_tensor_v2", b"_rebuild_tensor_v9")
    with pytest.raises(ValueError, match="distcp: weight: is not a readable tensor"):
        TorchDistDirectory(copy).read("weight")


def test_metadata_of_other_programs_is_checked_before_tensors_are_read(copy):
    (copy / CHECKSUMS).unlink()
    metadata = copy / ".metadata"
    saved = metadata.read_bytes()
    for old, new in ((b"chunks", b"chumks"), (b"relative_path", b"relatife_path")):
        replace_in(metadata, old, new)
        with pytest.raises(ValueError, match="not the metadata of a checkpoint"):
            TorchDistDirectory(copy)
        metadata.write_bytes(saved)
