"""Items of the data set: their state is one integer, and their tensors mean what the contract says."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from neo_megatron.data.dataset import PackDataset, collate, native_positions
from neo_megatron.data.errors import DataError
from neo_megatron.data.shards import ShardSet


@pytest.fixture
def packs(bench, new_sample):
    """Samples of many lengths, some with pictures, one without any trained turn but the last, in packs of 96."""
    bench.pictures("a.png", "b.png", "c.png")
    records = []
    for number in range(40):
        picture = "abc"[number % 3] + ".png"
        records.append(new_sample(*["word " * (number % 7), "answer " * (1 + number % 5)] * (1 + number % 2)))
        records.append(new_sample("<image> what", "this " * (number % 4), image=picture))
    records.append(new_sample("<image> <image>", "both", "then", "that", image=["a.png", "c.png"]))
    records[-1]["conversations"][1]["is_input"] = True
    bench.preprocess(records)
    return bench.pack(96)


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_any_item_alone_equals_reading_in_order(packs):
    dataset = PackDataset(packs, 100, seed=5)
    in_order = [dataset[index] for index in range(100)]
    for index in (99, 0, 57, 3):
        assert equal(PackDataset(packs, 100, seed=5)[index], in_order[index])
    assert equal(pickle.loads(pickle.dumps(dataset))[42], in_order[42])


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(packs):
    dataset = PackDataset(packs, 1000, seed=0)
    count, shards = len(dataset.packs), dataset.packs.shards
    epochs = []
    for epoch in range(3):
        items = [dataset[epoch * count + place]["tokens"] for place in range(count)]
        documents = sum(int(dataset[epoch * count + place]["document"].max()) + 1 for place in range(count))
        assert documents == len(shards)
        epochs.append([tuple(item.tolist()) for item in items])
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    other = PackDataset(packs, count, seed=1)
    assert [tuple(other[index]["tokens"].tolist()) for index in range(count)] != epochs[0]


def test_items_end(packs):
    dataset = PackDataset(packs, 7, seed=0)
    assert len(dataset) == len(list(dataset)) == 7
    for index in (7, -1):
        with pytest.raises(IndexError):
            dataset[index]


def naive_positions(tokens, document, cells, ids):
    """The definition of the positions, one token at a time."""
    triples, images, image, previous = [], [], -1, None
    for place, token in enumerate(tokens):
        if document[place] < 0:
            triples.append((0, 0, 0))
            images.append(-1)
            continue
        if place == 0 or document[place] != document[place - 1]:
            t, previous = -1, None
        if token == ids.image_context:
            if previous == ids.image_start:
                t, image, cell = t + 1, image + 1, -1
            cell += 1
            triples.append((t, *divmod(cell, cells[image][1])))
            images.append(image)
        else:
            t += 1
            triples.append((t, 0, 0))
            images.append(-1)
        previous = token
    return triples, images


@pytest.mark.parametrize("weighting", ["square", "sample", "token"])
def test_tensors_against_a_naive_reading_of_the_samples(packs, weighting):
    dataset = PackDataset(packs, 60, seed=2, loss_weighting=weighting)
    shards = dataset.packs.shards
    by_tokens = {}
    for sample in range(len(shards)):
        shard, local = shards.locate(sample)
        grids = shard.grids[list(shard.picture_range(local))] // 2
        by_tokens[tuple(shard.tokens[local].tolist())] = (shard.spans[local].reshape(-1, 2).tolist(), grids.tolist())
    for item in dataset:
        tokens, document = item["tokens"].tolist(), item["document"].tolist()
        expected, cells = [], []
        for number in range(max(document) + 1):
            start, length = document.index(number), document.count(number)
            assert document[start : start + length] == [number] * length
            spans, grids = by_tokens[tuple(tokens[start : start + length])]
            count = sum(end - begin for begin, end in spans)
            weight = {"square": count**-0.5, "sample": 1 / count, "token": 1.0}[weighting]
            trained = [start + place for begin, end in spans for place in range(begin, end)]
            expected += [(place - 1, tokens[place], weight) for place in trained]
            cells += grids
        used = len(document) - document.count(-1)
        assert document[used:] == [-1] * (96 - used)
        assert tokens[used:] == [shards.ids.pad] * (96 - used)
        assert item["target_index"].tolist() == [place for place, _, _ in expected]
        assert item["targets"].tolist() == [token for _, token, _ in expected]
        np.testing.assert_allclose(item["target_weight"], [weight for _, _, weight in expected], rtol=1e-6)
        triples, images = naive_positions(tokens, document, cells, shards.ids)
        assert item["positions_thw"].tolist() == [list(triple) for triple in triples]
        assert item["image"].tolist() == images
        assert item["cell_index"].tolist() == [place for place, image in enumerate(images) if image >= 0]
        assert item["patches"].shape == (len(item["cell_index"]), 4, 768)


def test_patches_are_those_of_the_picture(bench, new_sample):
    """A cell's patches hold the pixels of its 32 x 32 square of the picture."""
    (bench.path / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(bench.path / "pictures" / "a.png")
    bench.preprocess([new_sample("<image>", "x", image="a.png")])
    item = PackDataset(bench.pack(64), 1, seed=0)[0]
    for cell, place in enumerate(item["cell_index"].tolist()):
        _, row, column = item["positions_thw"][place].tolist()
        for dy in range(2):
            for dx in range(2):
                top, left = row * 32 + dy * 16, column * 32 + dx * 16
                square = pixels[top : top + 16, left : left + 16].transpose(2, 0, 1).reshape(-1)
                assert (item["patches"][cell, dy * 2 + dx].numpy() == square).all()
    assert len(item["cell_index"]) == 6


def test_without_pictures_only_they_are_missing(packs):
    full, bare = PackDataset(packs, 20, seed=0), PackDataset(packs, 20, seed=0, pictures=False)
    for with_pictures, without in zip(full, bare, strict=True):
        assert without["patches"].shape == (0, 4, 768) and without["cell_index"].shape == (0,)
        rest = set(with_pictures) - {"patches", "cell_index"}
        assert equal({key: with_pictures[key] for key in rest}, {key: without[key] for key in rest})


def test_collate_counts_in_the_flattened_batch(packs):
    dataset = PackDataset(packs, 3, seed=0)
    items = list(dataset)
    batch = collate(items)
    assert batch["tokens"].shape == (3, 96) and batch["positions_thw"].shape == (3, 96, 3)
    flat = batch["tokens"].reshape(-1)
    assert torch.equal(flat[batch["target_index"] + 1], batch["targets"])
    assert (flat[batch["cell_index"]] == dataset.packs.shards.ids.image_context).all()
    assert len(batch["patches"]) == len(batch["cell_index"]) == sum(len(item["patches"]) for item in items)
    assert torch.equal(batch["patches"][: len(items[0]["patches"])], items[0]["patches"])
    assert torch.equal(batch["document"], torch.stack([item["document"] for item in items]))


def test_over_long_samples_are_listed_and_the_rest_is_packed(bench, new_sample):
    bench.preprocess([new_sample("a", "b"), new_sample("long " * 100, "c"), [new_sample(), new_sample("d " * 90, "e")]])
    packs = bench.pack(64)
    assert [(entry["record"], entry["kind"]) for entry in bench.rejects("packs")] == [
        (1, "over-long sample"),
        (2, "over-long sample"),
    ]
    counts = json.loads((packs / "manifest.json").read_text())["counts"]
    assert counts["samples_packed"] + counts["samples_rejected"] == counts["samples_read"] == 4
    assert sorted(PackDataset(packs, 1, seed=0).packs.samples.tolist()) == [0, 2]


def test_a_sample_as_long_as_a_pack_fits(bench, new_sample):
    shards = bench.preprocess([new_sample("a", "b"), new_sample("long " * 30, "c")])
    lengths, _ = shards.lengths_and_records()
    packs = PackDataset(bench.pack(int(lengths[1])), 2, seed=0).packs
    assert sorted(packs.samples.tolist()) == [0, 1]
    with pytest.raises(DataError, match="nothing can be packed"):
        bench.pack(int(lengths[0]) - 1, output="short")


def test_over_long_samples_stop_the_tool_where_asked(bench, new_sample, run_tool):
    bench.preprocess([new_sample(), new_sample("long " * 100, "c")])
    shards, packs = bench.path / "shards", bench.path / "packs"
    done = run_tool("pack_data.py", "--data", shards, "--output", packs, "--seq-length", 64, "--on-error", "fail")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "record 1: the sample has" in done.stderr.splitlines()[-1]
    assert not packs.exists()


def test_list_packed_samples_share_a_pack(bench, new_sample):
    groups = [[new_sample("q " * n, "a") for n in range(1 + number % 4)] for number in range(30)]
    bench.preprocess(groups)
    records = np.repeat(np.arange(30), [len(group) for group in groups])
    index = PackDataset(bench.pack(128), 1, seed=0).packs
    for record in range(30):
        members = set(np.flatnonzero(records == record).tolist())
        assert sum(bool(members & set(index[number].tolist())) for number in range(len(index))) == 1


def test_same_packs_again(bench, new_sample, directory_bytes):
    bench.preprocess([new_sample("w " * n, "x") for n in range(50)])
    first = directory_bytes(bench.pack(100, output="first"))
    assert directory_bytes(bench.pack(100, output="again")) == first
    assert directory_bytes(bench.pack(100, seed=1, output="other")) != first


def test_packs_of_other_shards_are_refused(bench, new_sample):
    bench.preprocess([new_sample()])
    packs = bench.pack(64)
    manifest = bench.path / "shards" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DataError, match="is not the data set that"):
        PackDataset(packs, 1, seed=0)


def test_a_folder_of_shards_and_packs_can_be_moved(bench, new_sample):
    bench.preprocess([new_sample()])
    bench.pack(64)
    (bench.path / "moved").mkdir()
    for name in ("shards", "packs"):
        (bench.path / name).rename(bench.path / "moved" / name)
    assert len(PackDataset(bench.path / "moved" / "packs", 1, seed=0)[0]["targets"]) > 0


def test_positions_restart_in_every_document(bench, new_sample):
    bench.pictures("a.png")
    shards: ShardSet = bench.preprocess([new_sample("<image>", "x", image="a.png")])
    tokens = np.tile(shards.shard(0).tokens[0].astype(np.int64), 3)
    document = np.repeat(np.arange(3), len(tokens) // 3)
    positions, image = native_positions(tokens, document, np.tile(shards.shard(0).grids, (3, 1)), shards.ids)
    thirds = positions.reshape(3, -1, 3)
    assert (thirds[0] == thirds[1]).all() and (thirds[0] == thirds[2]).all() and thirds[0, 0, 0] == 0
    assert image.max() == 2
