"""The mixtures in examples/ can be read, and have the published shares."""

import shutil

import pytest
from support.paths import ROOT

from neo_megatron.data.packs.mixture_schedule import open_streams, pack_lengths

FILES = sorted((ROOT / "examples" / "mixtures").glob("*.yaml"))
# Directories of packs with tokens of a pack; phases with the share of each directory.
PUBLISHED = {
    "neo_ov_stage2": (
        {
            f"packs-{k}k/{kind}": k * 1024
            for k in (16, 36)
            for kind in ("text", "image-text", "several-images", "video")
        },
        [(2, 4, 1, 1, 0, 0, 0, 0), (0, 0, 0, 0, 2, 4, 1, 1)],
    ),
    "neo_ov_stage3": (
        {f"packs-36k/{kind}": 36 * 1024 for kind in ("one-image", "several-images", "video")},
        [(4, 1, 1)],
    ),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_mixes_packs_in_the_published_shares(file, bench, new_sample):
    directories, counts = PUBLISHED[file.stem]
    bench.preprocess([new_sample()])
    for place, length in directories.items():
        bench.pack(length, output=place)
    mixture = shutil.copy(file, bench.path)
    streams, schedule = open_streams(mixture)
    assert [stream.location for stream in streams] == [str(bench.path / place) for place in directories]
    assert [phase.counts for phase in schedule.phases] == counts
    assert [length for _, length in pack_lengths(streams, schedule)] == sorted(set(directories.values()))
