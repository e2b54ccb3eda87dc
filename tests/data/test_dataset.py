"""Items of the data set: their state is one integer, and their tensors are those of the documented contract."""

import dataclasses
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from neo_megatron.data.chat import ChatEncoder
from neo_megatron.data.dataset import GlobalBatch, PackDataset, collate, native_positions
from neo_megatron.data.packs.balance import imbalance
from neo_megatron.data.packs.writer import HeldOut, PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError
from neo_megatron.run.broken_samples import watch_broken_samples


@pytest.fixture
def packs(bench, new_sample):
    """Samples of many lengths, some with images, one in which only the last turn is trained, in packs of 96."""
    bench.images("a.png", "b.png", "c.png")
    records = []
    for number in range(40):
        image = "abc"[number % 3] + ".png"
        records.append(new_sample(*["word " * (number % 7), "answer " * (1 + number % 5)] * (1 + number % 2)))
        records.append(new_sample("<image> what", "this " * (1 + number % 4), image=image))
    records.append(new_sample("<image> <image>", "both", "then", "that", image=["a.png", "c.png"]))
    records[-1]["conversations"][1]["is_input"] = True
    bench.preprocess(records)
    return bench.pack(96)


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[key], right[key]) if torch.is_tensor(left[key]) else left[key] == right[key] for key in left
    )


def test_random_access_equals_reading_in_order(packs):
    dataset = PackDataset(packs, 100, seed=5)
    in_order = [dataset[index] for index in range(100)]
    for index in (99, 0, 57, 3):
        assert equal(PackDataset(packs, 100, seed=5)[index], in_order[index])
    sent = pickle.dumps(dataset)
    assert len(sent) < 1000 and equal(pickle.loads(sent)[42], in_order[42])


@pytest.fixture
def mixture(packs, bench, new_sample):
    """A schedule over the packs above and others, with images kept as pixels."""
    settings = dataclasses.replace(bench.settings, image_store="patches")
    records = [new_sample("<image> this", "word " * (1 + number % 9), image="b.png") for number in range(20)]
    bench.preprocess(records, "other", settings)
    bench.pack(96, data="other", output="other-packs")
    file = bench.path / "mixture.yaml"
    file.write_text("- {from: 0, shares: {packs: 2}}\n- {from: 7, shares: {packs: 1, other-packs: 3}}\n")
    return file


def test_items_of_a_mixture_are_those_of_its_directories(mixture):
    """The reference is each directory alone, from its first pack on; the state is one integer."""
    alone = [PackDataset(mixture.parent / name, 1000, seed=5) for name in ("packs", "other-packs")]
    mixed = PackDataset(mixture, 100, seed=5)
    streams, numbers = mixed._schedule.places(0, 100)
    assert 0 < streams[7:].mean() < 1 and numbers.max() > len(alone[1].packs), "more than an epoch of the second"
    for index in (99, 0, 50, *range(6, 20)):
        again = PackDataset(mixture, 100, seed=5)
        expected = alone[streams[index]][int(numbers[index])]
        assert equal(mixed[index], expected) and equal(again[index], expected)
        assert mixed.describe(index) == alone[streams[index]].describe(int(numbers[index]))
    assert equal(pickle.loads(pickle.dumps(mixed))[42], mixed[42])
    assert mixed.largest(0, 100) == max(mixed.largest(number, 1) for number in range(100))


def test_batches_of_a_mixture_are_balanced(mixture):
    plain = PackDataset(mixture, 48, seed=5)
    even = PackDataset(mixture, 48, seed=5, global_batch=GlobalBatch(size=12, ranks=3, micro_batch_size=2))
    for first in range(0, 48, 12):
        drawn, dealt = (
            [item["tokens"].tolist() for item in map(data.__getitem__, range(first, first + 12))]
            for data in (plain, even)
        )
        assert sorted(drawn) == sorted(dealt)
    assert any(not equal(plain[index], even[index]) for index in range(48))


def test_directories_of_a_mixture_must_fit_each_other(mixture, bench):
    bench.pack(64, data="other", output="short")
    mixture.write_text("- {from: 0, shares: {packs: 1, short: 1}}")
    with pytest.raises(DataError, match="packs of 96 tokens, .*short of 64: pack one of them again"):
        PackDataset(mixture, 1, seed=0)


def test_phases_of_a_mixture_may_differ_in_length(mixture, bench):
    bench.pack(64, data="other", output="short")
    mixture.write_text("- {from: 0, shares: {short: 1}}\n- {from: 5, shares: {packs: 1, other-packs: 1}}")
    mixed = PackDataset(mixture, 20, seed=5)
    assert mixed.lengths == ((0, 64), (5, 96))
    assert [len(mixed[number]["tokens"]) for number in range(20)] == [64] * 5 + [96] * 15
    short = PackDataset(mixture.parent / "short", 5, seed=5)
    assert all(equal(mixed[number], short[number]) for number in range(5))
    for first in (0, 5):
        size = max(sum(t.nbytes for t in mixed[n].values() if torch.is_tensor(t)) for n in range(first, first + 5))
        assert size <= mixed.largest(first, 5)


def documents_of(item: dict) -> list[tuple[int, ...]]:
    """The documents of an item as their tokens."""
    return [tuple(item["tokens"][item["document"] == n].tolist()) for n in range(int(item["document"].max()) + 1)]


def test_every_epoch_has_every_sample_once_in_new_packs(packs):
    dataset = PackDataset(packs, 1000, seed=0)
    count, data = len(dataset.packs), dataset.packs.data
    every = sorted(tuple(stored.tokens.tolist()) for stored, _ in data.fetch(range(len(data))))
    epochs = []
    for epoch in range(3):
        items = [documents_of(dataset[epoch * count + place]) for place in range(count)]
        assert sorted(sum(items, [])) == every
        epochs.append(items)
    other = PackDataset(packs, count, seed=1)
    epochs.append([documents_of(other[index]) for index in range(count)])
    for number, items in enumerate(epochs):
        assert all(items != others for others in epochs[:number])
        assert number == 0 or {*map(tuple, items)} != {*map(tuple, epochs[0])}  # other neighbours, not only an order


def test_balancing_reorders_the_packs_of_a_global_batch(packs):
    plain = PackDataset(packs, 48, seed=5)
    even = PackDataset(packs, 48, seed=5, global_batch=GlobalBatch(size=12, ranks=3, micro_batch_size=2))
    for start in range(0, 48, 12):
        drawn, dealt = ([documents_of(dataset[start + n]) for n in range(12)] for dataset in (plain, even))
        assert sorted(drawn) == sorted(dealt)
        costs = [
            np.array(
                [[sum(len(document) ** 2 for document in items), (item["image"] >= 0).sum()] for items, item in side]
            )
            for side in (
                [(documents_of(dataset[start + n]), dataset[start + n]) for n in range(12)] for dataset in (plain, even)
            )
        ]
        assert imbalance(costs[1], 3, 2).max() < imbalance(costs[0], 3, 2).max()


@pytest.mark.parametrize("size", [12, 6, 24])
def test_a_run_resumed_with_another_global_batch_reads_the_remaining_packs(packs, size):
    before = PackDataset(packs, 120, seed=5, global_batch=GlobalBatch(12, 3, 2))
    after = PackDataset(packs, 120, seed=5, global_batch=GlobalBatch(size, 3, 2, start=36))
    plain = PackDataset(packs, 120, seed=5)
    items = [documents_of(before[n]) for n in range(36)] + [documents_of(after[n]) for n in range(36, 108)]
    assert sorted(items) == sorted(documents_of(plain[n]) for n in range(108))
    if size == 12:
        assert [documents_of(before[n]) for n in range(36, 60)] == items[36:60]


@pytest.mark.parametrize("images", ["patches", "none"])
def test_the_largest_item_is_known_without_reading_items(packs, images):
    """It is an upper bound: which tokens are trained is not known, so all are counted as trained."""
    dataset = PackDataset(packs, 100, seed=5, images=images)
    read = [sum(part.nbytes for part in dataset[n].values() if torch.is_tensor(part)) for n in range(10, 60)]
    assert max(read) <= dataset.largest(10, 50) <= max(read) + 20 * dataset.packs.sequence_length


def test_items_end(packs):
    dataset = PackDataset(packs, 7, seed=0)
    assert len(dataset) == len(list(dataset)) == 7
    for index in (7, -1):
        with pytest.raises(IndexError):
            dataset[index]


def naive_positions(tokens, document, grids, ids):
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
                t, image, number = t + 1, image + 1, -1
            number += 1
            triples.append((t, *divmod(number, grids[image][1])))
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
    shards = dataset.packs.data.sets[0]
    by_tokens = {}
    for sample in range(len(shards)):
        shard, local = shards.locate(sample)
        grids = shard.grids[list(shard.image_range(local))] // 2
        by_tokens[tuple(shard.tokens[local].tolist())] = (shard.spans[local].reshape(-1, 2).tolist(), grids.tolist())
    for item in dataset:
        tokens, document = item["tokens"].tolist(), item["document"].tolist()
        expected, merged = [], []
        for number in range(max(document) + 1):
            start, length = document.index(number), document.count(number)
            assert document[start : start + length] == [number] * length
            spans, grids = by_tokens[tuple(tokens[start : start + length])]
            count = sum(end - begin for begin, end in spans)
            weight = {"square": count**-0.5, "sample": 1 / count, "token": 1.0}[weighting]
            trained = [start + place for begin, end in spans for place in range(begin, end)]
            expected += [(place - 1, tokens[place], weight) for place in trained]
            merged += grids
        used = len(document) - document.count(-1)
        assert document[used:] == [-1] * (96 - used)
        assert tokens[used:] == [shards.ids.pad] * (96 - used)
        assert item["target_index"].tolist() == [place for place, _, _ in expected]
        assert item["targets"].tolist() == [token for _, token, _ in expected]
        np.testing.assert_allclose(item["target_weight"], [weight for _, _, weight in expected], rtol=1e-6)
        triples, images = naive_positions(tokens, document, merged, shards.ids)
        assert item["positions_thw"].tolist() == [list(triple) for triple in triples]
        assert item["image"].tolist() == images
        assert item["image_token_index"].tolist() == [place for place, image in enumerate(images) if image >= 0]
        assert item["patches"].shape == (len(item["image_token_index"]), 4, 768)


def test_image_tokens_of_old_shards_are_not_targets(bench, new_sample, monkeypatch):
    """Old shards could have images of assistant turns in trained spans; here all but the first token are trained."""
    lay_out = ChatEncoder._lay_out

    def all_trained(self, turns, counts):
        return [(piece, number > 0) for number, (piece, _) in enumerate(lay_out(self, turns, counts))]

    monkeypatch.setattr(ChatEncoder, "_lay_out", all_trained)
    bench.images("a.png")
    shards = bench.preprocess([new_sample("see <image> there", "x", image="a.png")])
    item, ids = PackDataset(bench.pack(64), 1, seed=0)[0], shards.ids
    tokens = shards.fetch([0])[0].tokens
    text = [token for token in tokens.tolist()[1:] if token not in (ids.image_start, ids.image_context, ids.image_end)]
    assert item["targets"].tolist() == text and len(text) < len(tokens) - 3
    assert np.allclose(item["target_weight"], len(text) ** -0.5)


def test_patches_are_those_of_the_image(bench, new_sample):
    """The patches of an image token hold the pixels of its 32 x 32 square of the image."""
    (bench.path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(bench.path / "images" / "a.png")
    bench.preprocess([new_sample("<image>", "x", image="a.png")])
    item = PackDataset(bench.pack(64), 1, seed=0)[0]
    for number, place in enumerate(item["image_token_index"].tolist()):
        _, row, column = item["positions_thw"][place].tolist()
        for dy in range(2):
            for dx in range(2):
                top, left = row * 32 + dy * 16, column * 32 + dx * 16
                square = pixels[top : top + 16, left : left + 16].transpose(2, 0, 1).reshape(-1)
                assert (item["patches"][number, dy * 2 + dx].numpy() == square).all()
    assert len(item["image_token_index"]) == 6


def test_without_images_only_image_tensors_are_missing(packs):
    full, bare = PackDataset(packs, 20, seed=0), PackDataset(packs, 20, seed=0, images="none")
    for with_images, without in zip(full, bare, strict=True):
        assert without["patches"].shape == (0, 4, 768) and without["image_token_index"].shape == (0,)
        rest = set(with_images) - {"patches", "image_token_index"}
        assert equal({key: with_images[key] for key in rest}, {key: without[key] for key in rest})


def test_collate_counts_in_the_flattened_batch(packs):
    dataset = PackDataset(packs, 3, seed=0)
    items = list(dataset)
    batch = collate(items)
    assert batch["tokens"].shape == (3, 96) and batch["positions_thw"].shape == (3, 96, 3)
    flat = batch["tokens"].reshape(-1)
    assert torch.equal(flat[batch["target_index"] + 1], batch["targets"])
    assert (flat[batch["image_token_index"]] == dataset.packs.data.ids.image_context).all()
    assert len(batch["patches"]) == len(batch["image_token_index"]) == sum(len(item["patches"]) for item in items)
    assert torch.equal(batch["patches"][: len(items[0]["patches"])], items[0]["patches"])
    assert torch.equal(batch["document"], torch.stack([item["document"] for item in items]))


def samples_of(packs) -> list[int]:
    """The samples of all packs, sorted."""
    index = PackDataset(packs, 1, seed=0).packs
    return sorted(sum((index.samples(0, 0, place).tolist() for place in range(len(index))), []))


def test_over_long_samples_are_listed_and_the_rest_is_packed(bench, new_sample):
    bench.preprocess([new_sample("a", "b"), new_sample("long " * 100, "c"), [new_sample(), new_sample("d " * 90, "e")]])
    packs = bench.pack(64)
    assert [(entry["record"], entry["kind"]) for entry in bench.rejects("packs")] == [
        (1, "over-long sample"),
        (2, "over-long sample"),
    ]
    counts = json.loads((packs / "manifest.json").read_text())["counts"]
    assert counts["samples_packed"] + counts["samples_rejected"] == counts["samples_read"] == 4
    assert samples_of(packs) == [0, 2]


def test_a_sample_as_long_as_a_pack_fits(bench, new_sample):
    shards = bench.preprocess([new_sample("a", "b"), new_sample("long " * 30, "c")])
    lengths = shards.shard(0).tokens.lengths
    assert samples_of(bench.pack(int(lengths[1]))) == [0, 1]
    with pytest.raises(DataError, match="is left to pack"):
        bench.pack(int(lengths[0]) - 1, output="short")


def test_over_long_samples_stop_the_tool_with_on_error_fail(bench, new_sample, run_tool):
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
        assert sum(bool(members & set(index.samples(3, 1, place).tolist())) for place in range(len(index))) == 1


def test_packing_again_gives_the_same_packs(bench, new_sample, directory_bytes):
    bench.preprocess([new_sample("w " * n, "x") for n in range(50)])
    first = directory_bytes(bench.pack(100, output="first"))
    assert directory_bytes(bench.pack(100, output="again")) == first


def test_packs_of_changed_shards_are_rejected(bench, new_sample):
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
    bench.images("a.png")
    shards: ShardSet = bench.preprocess([new_sample("<image>", "x", image="a.png")])
    tokens = np.tile(shards.shard(0).tokens[0].astype(np.int64), 3)
    document = np.repeat(np.arange(3), len(tokens) // 3)
    positions, image = native_positions(tokens, document, np.tile(shards.shard(0).grids, (3, 1)), shards.ids)
    thirds = positions.reshape(3, -1, 3)
    assert (thirds[0] == thirds[1]).all() and (thirds[0] == thirds[2]).all() and thirds[0, 0, 0] == 0
    assert image.max() == 2


def test_a_pack_has_its_number_however_it_is_dealt(mixture):
    """The number that a training names, with which it is found again."""
    plain, dealt = (PackDataset(mixture, 24, 5, global_batch=batch) for batch in (None, GlobalBatch(12, 3, 2)))
    numbers = [dealt.pack(item).number for item in range(24)]
    assert sorted(numbers) == list(range(24)) != numbers
    for item, number in enumerate(numbers):
        assert plain.pack(number).number == number and plain.describe(number) == dealt.describe(item)
        assert equal(plain[number], dealt[item])


def test_jpeg_augmentation_does_not_depend_on_how_packs_are_dealt(packs):
    plain = PackDataset(packs, 24, seed=5, min_jpeg_quality=20)
    dealt = PackDataset(packs, 24, seed=5, min_jpeg_quality=20, global_batch=GlobalBatch(12, 3, 2))
    images = [sorted(dataset[n]["patches"].numpy().tobytes() for n in range(24)) for dataset in (plain, dealt)]
    assert images[0] == images[1]


def test_several_data_sets_with_shares(bench, new_sample):
    """Every epoch has half of one data set and the other twice; samples are reported with their own files."""
    first = bench.preprocess(bench.annotations([new_sample(f"a{n}", "b") for n in range(20)], "a.json"), "first")
    second = bench.preprocess(bench.annotations([new_sample(f"c{n}", "d e") for n in range(5)], "c.json"), "second")
    inputs = [PackInput(str(first.location), Fraction(1, 2)), PackInput(str(second.location), Fraction(2))]
    (manifest,) = write_packs(inputs, bench.path / "packs", 64)
    assert [entry["samples"] for entry in manifest["data"]] == [10, 10]
    index = PackDataset(bench.path / "packs", 1, seed=0).packs
    counts = np.bincount(samples_of(bench.path / "packs"), minlength=25)
    assert counts[:20].sum() == 10 and counts[:20].max() == 1 and (counts[20:] == 2).all()
    assert [index.data.describe(n) for n in (3, 22)] == [
        (str(bench.path / "a.json"), 3),
        (str(bench.path / "c.json"), 2),
    ]
    fetched = [stored.tokens.tolist() for stored, _ in index.data.fetch([22, 3, 24])]
    assert fetched == [
        second.fetch([2])[0].tokens.tolist(),
        first.fetch([3])[0].tokens.tolist(),
        second.fetch([4])[0].tokens.tolist(),
    ]


def test_the_draw_does_not_depend_on_other_data_sets(bench, new_sample):
    first = bench.preprocess(bench.annotations([new_sample(f"a{n}", "b") for n in range(40)], "a.json"), "first")
    second = bench.preprocess(bench.annotations([new_sample(f"c{n}", "d") for n in range(7)], "c.json"), "second")
    half = PackInput(str(first.location), Fraction(1, 2))
    write_packs([half], bench.path / "alone", 64)
    write_packs([PackInput(str(second.location)), half], bench.path / "mixed", 64)
    drawn = [n - 7 for n in samples_of(bench.path / "mixed") if n >= 7]
    assert drawn == samples_of(bench.path / "alone") and len(drawn) == 20


def test_the_draw_does_not_depend_on_the_location(bench, new_sample):
    drawn = []
    for name in ("here", "there", "elsewhere"):
        annotations = bench.annotations([new_sample(f"a{n}", "b") for n in range(40)], f"{name}.json")
        shards = bench.preprocess(annotations, f"{name}-shards")
        write_packs([PackInput(str(shards.location), Fraction(1, 2))], bench.path / f"{name}-packs", 64)
        drawn.append(samples_of(bench.path / f"{name}-packs"))
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize(("percent", "total"), [(50, 6), (130, 16)])
def test_shares_of_many_small_data_sets_add_up(bench, new_sample, percent, total):
    inputs = []
    for number in range(12):
        file = bench.annotations([new_sample(f"q{number}", "a")], f"{number}.json")
        inputs.append(PackInput(str(bench.preprocess(file, f"shards{number}").location), Fraction(percent, 100)))
    (manifest,) = write_packs(inputs, bench.path / "packs", 64)
    assert manifest["counts"]["samples_packed"] == total
    drawn = [entry["samples"] for entry in manifest["data"]]
    assert max(drawn) - min(drawn) <= 1
    assert verify(bench.path / "packs").damage == []


def test_held_out_records_are_packed_once_whatever_the_share(bench, new_sample):
    shards = bench.preprocess([new_sample(f"a{n}", "b") for n in range(60)])
    packed = {}
    for percent in (50, 100, 200):
        held = HeldOut(Fraction(1, 4), str(bench.path / f"held{percent}"))
        share = [PackInput(str(shards.location), Fraction(percent, 100))]
        write_packs(share, bench.path / f"rest{percent}", 64, held_out=held)
        packed[percent] = samples_of(bench.path / f"held{percent}")
        assert not set(packed[percent]) & set(samples_of(bench.path / f"rest{percent}"))
        assert verify(bench.path / f"held{percent}").damage == verify(bench.path / f"rest{percent}").damage == []
    assert packed[50] == packed[100] == packed[200] and len(set(packed[100])) == len(packed[100])
    with pytest.raises(DataError, match="both name"):
        write_packs(share, bench.path / "same", 64, held_out=HeldOut(Fraction(1, 4), str(bench.path / "same")))


def test_data_sets_of_different_tokenizers_are_rejected(bench, new_sample):
    for name in ("first", "second"):
        bench.preprocess([new_sample()], name)
    manifest = bench.path / "second" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"size": ', '"size": 1'))
    with pytest.raises(DataError, match="different tokenizers"):
        write_packs([PackInput(str(bench.path / name)) for name in ("first", "second")], bench.path / "packs", 64)


def test_conversations_of_two_chat_layouts_are_not_packed_together(bench, new_sample):
    for name in ("neo1_0", "u1"):
        bench.preprocess([new_sample()], name, dataclasses.replace(bench.settings, chat_layout=name))
        write_packs([PackInput(str(bench.path / name))], bench.path / f"{name}-packs", 64)
    (bench.path / "text.jsonl").write_text('{"text": "A page."}\n')
    source = Source("text", str(bench.path / "text.jsonl"), schema=SchemaOptions("text"))
    preprocess([source], bench.tokenizer, bench.path / "text", bench.settings)
    with pytest.raises(
        DataError, match="neo1_0 was made with --chat-layout neo1_0, .*u1 with u1, so that answers begin"
    ):
        write_packs([PackInput(str(bench.path / name)) for name in ("text", "neo1_0", "u1")], bench.path / "packs", 64)
    write_packs([PackInput(str(bench.path / name)) for name in ("text", "u1")], bench.path / "text-u1", 64)
    mixture = bench.path / "mixture.yaml"
    mixture.write_text("- {from: 0, shares: {neo1_0-packs: 1, text-u1: 1}}\n")
    with pytest.raises(DataError, match="--mixture .*with --chat-layout neo1_0, .*u1 with u1"):
        PackDataset(mixture, 1, seed=0)
    mixture.write_text("- {from: 0, shares: {u1-packs: 1, text-u1: 1}}\n")
    assert len(PackDataset(mixture, 2, seed=0)) == 2


def test_held_out_images_stay_held_out_when_the_data_set_grows(bench, new_sample, run_tool):
    """The same images are held out after the data set has grown and was reordered, and training has none of them."""
    bench.images("a.png")
    for number in range(60):
        (bench.path / "images" / f"{number}.png").write_bytes((bench.path / "images" / "a.png").read_bytes())
    records = [new_sample(f"<image> q{n}", "x", image=f"{n % 60}.png") for n in range(120)]
    records += [new_sample(f"text {n}", "y") for n in range(60)]
    held = []
    for name, order in (("one", records[:100]), ("two", records[::-1])):
        bench.preprocess(bench.annotations(order, f"{name}.json"), name)
        done = run_tool(
            *("pack_data.py", "--data", bench.path / name, "--output", bench.path / f"{name}-packs"),
            *("--seq-length", 256, "--held-out", 25, bench.path / f"{name}-held"),
        )
        assert done.returncode == 0, done.stderr
        sides = []
        for part in ("packs", "held"):
            index = PackDataset(bench.path / f"{name}-{part}", 1, seed=0).packs
            numbers = [index.data.describe(n)[1] for n in samples_of(bench.path / f"{name}-{part}")]
            sides.append([order[number] for number in numbers])
        assert len(sides[0]) + len(sides[1]) == len(order)
        named = [{sample["image"] for sample in side if "image" in sample} for side in sides]
        assert not named[0] & named[1] and 4 <= len(named[1]) <= 30
        held.append([json.dumps(sample) for sample in sides[1]])
    assert {*held[0]} == {*held[1]} & {json.dumps(record) for record in records[:100]}


def broken_image(bench, new_sample) -> None:
    """Two records; the image of the second is damaged after a header check."""
    bench.images("a.png", "b.png")
    good = (bench.path / "images" / "b.png").read_bytes()
    (bench.path / "images" / "b.png").write_bytes(good[:100] + b"damage" + good[106:])
    records = [new_sample("<image> what", "fine", image="a.png"), new_sample("<image> how", "well", image="b.png")]
    bench.preprocess(records, settings=dataclasses.replace(bench.settings, check="header"))


def test_a_broken_image_only_sets_the_weight_of_its_sample_to_zero(bench, new_sample):
    broken_image(bench, new_sample)
    item = PackDataset(bench.pack(128), 1, seed=0)[0]
    (sentence,) = item["broken"]
    assert "train.json, record 1: the image" in sentence and item["samples"] == 2
    weight = item["target_weight"]
    damaged = torch.tensor([int(item["document"][place]) for place in item["target_index"]])
    lost = set(damaged[weight == 0].tolist())
    assert len(lost) == 1 and (weight[damaged != lost.pop()] > 0).all()
    assert len(item["patches"]) == len(item["image_token_index"]) and (item["patches"].flatten(1) == 0).all(1).any()
    # A rank without images agrees, where it is asked to look.
    checked = PackDataset(bench.path / "packs", 1, seed=0, images="check")[0]
    assert torch.equal(checked["target_weight"], weight) and checked["broken"] == item["broken"]
    assert checked["patches"].shape == (0, 4, 768)


def test_broken_samples_are_reported_and_too_many_stop_the_run(bench, new_sample, capsys):
    broken_image(bench, new_sample)
    dataset = PackDataset(bench.pack(128), 3, seed=0)
    loader = torch.utils.data.DataLoader(dataset, collate_fn=collate, num_workers=1)
    assert len(list(watch_broken_samples(iter(loader), 0.003, report=True))) == 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "(3 of 6 read)" in lines[2] and "record 1: the image" in lines[2]
    with pytest.raises(
        DataError, match=r"^2 of the 4 samples read .* --max-broken-samples 0.001 .* record 1: .*verify"
    ):
        list(watch_broken_samples(iter(loader), 0.001, report=False))


def test_an_error_in_a_loader_worker_is_one_sentence(bench, new_sample):
    bench.preprocess([new_sample()])
    packs = bench.pack(64)
    (bench.path / "shards" / "00000.tokens.bin").write_bytes(b"cut")
    loader = torch.utils.data.DataLoader(PackDataset(packs, 1, seed=0), collate_fn=collate, num_workers=1)
    with pytest.raises(DataError) as caught:
        list(watch_broken_samples(iter(loader), 0.001, report=False))
    assert len(str(caught.value).splitlines()) == 1 and "00000.tokens.bin" in str(caught.value)


@pytest.mark.slow
def test_patches_are_read_without_an_image_library(bench, new_sample, monkeypatch):
    bench.images("a.png")
    bench.preprocess(
        [new_sample("<image>", "x", image="a.png")], settings=dataclasses.replace(bench.settings, image_store="patches")
    )
    packs = bench.pack(64)
    monkeypatch.setattr(Image, "open", None)
    monkeypatch.setattr(Image.Image, "resize", None)
    assert len(PackDataset(packs, 1, seed=0)[0]["patches"]) == 2


def test_jpeg_augmentation_is_drawn_for_each_item_and_off_by_default(bench, new_sample):
    bench.images("a.png")
    bench.preprocess([new_sample("<image>", "x", image="a.png")])
    packs = bench.pack(64)
    plain, augmented, again = (PackDataset(packs, 8, seed=0, min_jpeg_quality=quality) for quality in (100, 30, 30))
    assert all(torch.equal(plain[n]["patches"], plain[0]["patches"]) for n in range(8))
    assert all(torch.equal(augmented[n]["patches"], again[n]["patches"]) for n in range(8))
    assert len({augmented[n]["patches"].numpy().tobytes() for n in range(8)}) > 4
    difference = augmented[0]["patches"].float() - plain[0]["patches"].float()
    assert 0 < difference.abs().mean() < 60
    stored = bench.preprocess(
        [new_sample("<image>", "x", image="a.png")],
        "patches",
        settings=dataclasses.replace(bench.settings, image_store="patches"),
    )
    write_packs([PackInput(stored.location)], bench.path / "packs2", 64)
    with pytest.raises(DataError, match="--image-store encoded"):
        PackDataset(bench.path / "packs2", 1, seed=0, min_jpeg_quality=30)
    with pytest.raises(DataError, match="from 1 to 100"):
        PackDataset(packs, 1, seed=0, min_jpeg_quality=0)
