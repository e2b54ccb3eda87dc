"""Whether a model looks at its images: what training and evaluation log of it, on many layouts.

With a learning rate of 0 every figure is that of the model that a run starts from. The reference is the exported
model's code in float64, document by document.
"""

import json
import re
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.dense_reference import DenseReference, grids_of
from support.layout_runs import SMALL, write_random_model
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.shards.reader import SAMPLE_MODALITIES

LENGTH, SEED, STEPS = 256, 1234, 2
TP2, PP2, CP2 = (f"--{kind}-parallel-size 2" for kind in ("tensor-model", "pipeline-model", "context"))
LAYOUTS = {
    "one": (1, "--micro-batch-size 2"),
    "dp2": (2, ""),
    "pp2-vp2": (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2"),
    "cp2-allgather": (2, f"{CP2} --cp-comm-type allgather --micro-batch-size 2 --eval-micro-batch-size 2"),
    "tp2-cp2-a2a": (4, f"{TP2} --sequence-parallel {CP2} --cp-comm-type a2a"),
    "pp2-dp2": (4, PP2),
}
EVALUATION = "--eval-interval 2 --eval-iters 2 --eval-global-batch-size 2"


def write_video(path: Path) -> None:
    with av.open(str(path), "w") as container:
        video = container.add_stream("mjpeg", rate=2)
        video.width, video.height, video.pix_fmt = 64, 64, "yuvj420p"
        for number in range(3):
            frame = np.full((64, 64, 3), 60 * number, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(video.encode())


@pytest.fixture(scope="module")
def packs(tmp_path_factory) -> Path:
    """Packs of four data sets: of text, of one image, of several images, and of videos with some images."""
    room = tmp_path_factory.mktemp("looking")
    draw = np.random.default_rng(0)
    for number in range(6):
        height, width = {4: (96, 64), 5: (64, 96)}.get(number, (64, 64))
        pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(room / f"{number}.png")
    write_video(room / "clip.mov")

    few = ("Red.", "It is blue, I say.", "A cat and a dog", "No")
    records = {
        "words": [record("What is it?", few[number % 4] * (1 + number % 3)) for number in range(8)],
        "colours": [record("<image>\nWhich?", few[number % 4], image=f"{number % 6}.png") for number in range(16)],
        "pairs": [
            record("<image> or <image>?", few[number % 4], image=[f"{number % 4}.png", "5.png"]) for number in range(6)
        ],
        "clips": [
            *(record("<video>\nWho?", answer, video="clip.mov") for answer in few),
            *(record("<image>\nWho?", answer, image="1.png") for answer in few),
        ],
    }
    return pack(room, records)


def record(question: str, answer: str, **media: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **media}


def pack(room: Path, records: dict[str, list[dict]]) -> Path:
    """Packs of the records of data sets."""
    sources = []
    for name, listed in records.items():
        (room / f"{name}.json").write_text(json.dumps(listed))
        sources.append(Source(name, str(room / f"{name}.json"), str(room)))
    settings = PreprocessConfig(min_pixels=4096, max_pixels=16384)
    preprocess(sources, GOLDEN / "tokenizer", room / "shards", settings)
    write_packs([PackInput(str(room / "shards"), share=Fraction(1))], room / "packs", LENGTH)
    return room / "packs"


@pytest.fixture(scope="module")
def learnt(model, tmp_path_factory) -> dict[str, Job]:
    """Two runs that learn the same words by heart: which are said is told by the image, or by the question."""
    jobs = []
    for name in ("looks", "reads"):
        room = tmp_path_factory.mktemp(name)
        for number in range(2):
            Image.new("RGB", (64, 64), (0, 0, 0) if number else (255, 255, 255)).save(room / f"{number}.png")
        told = [
            record(f"<image>\n{'Which?' if name == 'looks' else question}", answer, image=f"{image}.png")
            for image in (0, 1)
            for question, answer in (("First?", "AB"), ("Other?", "BA"))
            if name == "reads" or image == (answer == "AB")
        ]
        packs = pack(room, {name: told * 12})
        command = [
            *("--neo-model", model, "--pretrained-checkpoint", model / "megatron", "--seed", SEED, "--num-workers", 0),
            *("--train-data-path", packs, "--valid-data-path", packs, "--eval-interval", 40, "--eval-iters", 2),
            *("--micro-batch-size", 2, "--global-batch-size", 2, "--train-iters", 40, "--log-interval", 10),
            *("--lr", 2e-3, "--lr-decay-style", "constant", "--lr-warmup-iters", 0),
        ]
        jobs.append(Job(room / "run", list(map(str, command))))
    run_jobs(1, jobs)
    return {"looks": jobs[0], "reads": jobs[1]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), SMALL)


def blinded(model: Path, directory: Path) -> Path:
    """The model with a patch embedding of zeros."""
    (directory / "config.json").write_text((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("vision_model."):
            tensor.zero_()
    save_file(tensors, directory / "model.safetensors")
    convert_hf_to_megatron(directory, directory / "megatron")
    return directory


@pytest.fixture(scope="module")
def runs(packs, model, tmp_path_factory) -> dict[str, Job]:
    directory = tmp_path_factory.mktemp("runs")
    by_processes: dict[int, list[Job]] = defaultdict(list)
    for name, (processes, flags) in LAYOUTS.items():
        command = [
            *("--neo-model", model, "--pretrained-checkpoint", model / "megatron", "--seed", SEED),
            *("--train-data-path", packs, "--valid-data-path", packs),
            *("--micro-batch-size", 1, "--global-batch-size", 4, "--train-iters", STEPS, "--log-interval", STEPS),
            *("--lr", 0, "--min-lr", 0, "--lr-warmup-iters", 0, "--num-workers", 0),
            *EVALUATION.split(),
            *flags.split(),
        ]
        by_processes[processes].append(Job(directory / name, list(map(str, command))))
    one = by_processes[1][0]
    blind = blinded(model, tmp_path_factory.mktemp("blind"))
    swapped = [flag.replace(str(model), str(blind)) for flag in one.flags]
    by_processes[1].append(Job(directory / "blind", swapped))
    one.flags.extend(["--save", f"{one.directory}/saved"])
    for processes, jobs in by_processes.items():
        run_jobs(processes, jobs)
    return {job.directory.name: job for jobs in by_processes.values() for job in jobs}


@pytest.mark.thorough
def test_a_model_that_has_learnt_to_look_is_told_from_one_that_reads(learnt):
    """Both answer; images of other samples make the first one wrong, and make no difference to the second."""
    for name, job in learnt.items():
        assert job.exit() is None
        (loss,) = job.scalars("lm loss validation")[40]
        (permuted,) = job.scalars("looking/delta-permuted validation")[40]
        assert loss < 0.3, name
        assert (permuted > 1) if name == "looks" else (0 < abs(permuted) < 0.1)


@pytest.fixture(scope="module")
def reference(model) -> DenseReference:
    return DenseReference(model)


@pytest.fixture(scope="module")
def items(packs) -> dict[str, list[dict]]:
    """The packs of the training steps, and those of the evaluation."""
    training = PackDataset(packs, 4 * STEPS, SEED)
    evaluation = PackDataset(packs, None, SEED)
    return {
        "lm loss": [training[number] for number in range(4 * STEPS)],
        "lm loss validation": [evaluation[number] for number in range(4)],
    }


@pytest.fixture(scope="module")
def losses(packs, items, reference) -> dict[str, float]:
    """Means over the records of each data set and of each modality."""
    names = PackDataset(packs, None, SEED).data_sets
    assert names == ("clips", "colours", "pairs", "words")
    sums: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for loss, packs_of_loss in items.items():
        for item in packs_of_loss:
            of_target = zip(item["target_group"], item["target_weight"].double(), reference.losses(item), strict=True)
            for group, weight, nll in of_target:
                data_set, modality = divmod(int(group), len(SAMPLE_MODALITIES))
                for tag in (f"data set/{names[data_set]}", f"modality/{SAMPLE_MODALITIES[modality]}"):
                    sums[f"{loss} by {tag}"].append((float(weight * nll), float(weight)))
    return {tag: sum(nll for nll, _ in pairs) / sum(weight for _, weight in pairs) for tag, pairs in sums.items()}


def test_groups_are_those_of_the_records(packs):
    """The last records of `clips` have an image."""
    dataset = PackDataset(packs, None, SEED)
    modalities = {"words": "text", "colours": "image", "pairs": "several images"}
    seen = set()
    for number in range(len(dataset)):
        item = dataset[number]
        for group, sample in zip(item["target_group"], item["document"][item["target_index"]], strict=True):
            file, record = dataset.describe(number)[sample]
            name = Path(file).stem
            modality = modalities.get(name, "video" if record < 4 else "image")
            assert divmod(int(group), 4) == (dataset.data_sets.index(name), SAMPLE_MODALITIES.index(modality))
            seen.add((name, modality))
    assert len(seen) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_by_data_set_and_modality(runs, losses, layout):
    """Of all records of the interval and of the evaluation."""
    assert runs[layout].exit() is None
    scalars = runs[layout].every_scalar()
    logged = {tag: values for tag, values in scalars.items() if tag.startswith("lm loss") and " by " in tag}
    assert {tag for tag in losses if tag.startswith("lm loss by")} >= {
        *(f"lm loss by data set/{name}" for name in ("clips", "colours", "pairs", "words")),
        *(f"lm loss by modality/{name}" for name in SAMPLE_MODALITIES),
    }
    assert logged == {tag: {STEPS: [pytest.approx(value, rel=1e-5)]} for tag, value in losses.items()}


def test_the_console_has_modalities_alone(runs, losses):
    printed = runs["one"].printed()
    words = ", ".join(f"{name} [0-9.]+" for name in SAMPLE_MODALITIES)
    assert re.search(rf"\| loss by modality: {words} \|", printed)
    assert re.search(r"^iteration 2 \| validation loss by modality: ", printed, re.M)
    assert "colours" not in printed.split("training ...")[-1]


def of_other_samples(item: dict) -> tuple[torch.Tensor, set[int]]:
    """Patches of a pack with each image that of the next sample with its grid, and the samples with another image."""
    image, document = item["image"], item["document"]
    tokens = image[image >= 0]
    owners = [int(document[image == number][0]) for number in range(int(image.max()) + 1)]
    grids = [tuple(grid) for grid in grids_of(item).tolist()]
    patches, exchanged = item["patches"].clone(), set()
    for number, (owner, grid) in enumerate(zip(owners, grids, strict=True)):
        others = sorted({other for other, like in zip(owners, grids, strict=True) if like == grid})
        if len(others) == 1:
            continue
        exchanged.add(owner)
        donor = others[(others.index(owner) + 1) % len(others)]
        of_donor, own = (
            [one for one in range(len(owners)) if owners[one] == sample and grids[one] == grid]
            for sample in (donor, owner)
        )
        patches[tokens == number] = item["patches"][tokens == of_donor[own.index(number) % len(of_donor)]]
    return patches, exchanged


@pytest.fixture(scope="module")
def looks(items, reference) -> dict[str, float]:
    """The figures of the evaluation, without its split."""
    losses = defaultdict(float)
    with_images, exchanged_samples, attention = set(), set(), []
    for number, item in enumerate(items["lm loss validation"]):
        of_target, weight = item["document"][item["target_index"]], item["target_weight"].double()
        owners = set(item["document"][item["image"] >= 0].tolist())
        patches, exchanged = of_other_samples(item)
        with_images |= {(number, sample) for sample in owners}
        exchanged_samples |= {(number, sample) for sample in exchanged}
        blank = torch.tensor([124, 116, 104], dtype=torch.uint8).repeat_interleave(256).expand_as(patches)
        own, weights = reference.run(item)
        for view, shown in (("permuted", patches), ("blank", blank)):
            chosen = torch.tensor([int(one) in (exchanged if view == "permuted" else owners) for one in of_target])
            seen = reference.losses({**item, "patches": shown})
            losses[view] += float((weight * seen)[chosen].sum())
            losses[f"own {view}"] += float((weight * own)[chosen].sum())
        rows = torch.tensor([int(one) in owners for one in of_target])
        attention.append(torch.stack([layer[:, rows][..., item["image"] >= 0].sum(dim=-1) for layer in weights]))
    assert 0 < len(with_images - exchanged_samples) < len(exchanged_samples)
    of_layers = torch.cat(attention, dim=-1).mean(dim=(1, 2)).tolist()
    return {
        **{f"delta-{view}": losses[view] / losses[f"own {view}"] - 1 for view in ("permuted", "blank")},
        "without partner": len(with_images - exchanged_samples) / len(with_images),
        "image attention": sum(of_layers) / len(of_layers),
        **{f"image attention layer {number:02d}": share for number, share in enumerate(of_layers)},
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_with_other_images_and_attention_to_images(runs, looks, layout):
    """Of the packs of the evaluation; of attention, of the first four, which are all of them."""
    scalars = runs[layout].every_scalar()
    logged = {tag: values[STEPS][0] for tag, values in scalars.items() if tag.startswith("looking/")}
    assert logged == {f"looking/{name} validation": pytest.approx(value, abs=2e-6) for name, value in looks.items()}
    assert abs(looks["delta-permuted"]) > 1e-4 and abs(looks["delta-blank"]) > 1e-4


def test_a_model_that_cannot_see_has_no_delta(runs):
    """Its patch embedding is zero."""
    scalars = runs["blind"].every_scalar()
    for delta in ("delta-permuted", "delta-blank"):
        assert scalars[f"looking/{delta} validation"] == {STEPS: [0.0]}
    assert scalars["looking/image attention validation"][STEPS][0] > 0


def test_the_file_of_scalars_holds_what_tensorboard_does(runs):
    lines = [json.loads(line) for line in (runs["one"].directory / "saved" / "scalars.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2], "the evaluation has a line of its own"
    logged = {tag: values for tag, values in runs["one"].every_scalar().items() if not tag.endswith(" vs packs")}
    in_file: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for line in lines:
        step = line.pop("step")
        for tag, value in line.items():
            in_file[tag][step] = [pytest.approx(value, rel=1e-6)]  # TensorBoard's are float32
    assert logged == in_file
