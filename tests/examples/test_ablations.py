"""What the ablations rest on: ablated inputs, a start with a pre-buffer, answers, intervals and verdicts."""

import json
import math
import subprocess
import sys
from itertools import product
from statistics import mean

import arms
import compare
import inputs
import page
import pytest
import results
import run
import torch
from support.golden_packs import TOOLS, make_packs
from torch.utils.tensorboard import SummaryWriter

from neo_megatron.data.dataset import PackDataset, collate
from neo_megatron.errors import ConfigError
from neo_megatron.model.mask import AttentionRule
from neo_megatron.model.micro_batch import model_inputs
from neo_megatron.presets import SIZES

KINDS = results.KINDS


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    room = tmp_path_factory.mktemp("ablations")
    make_packs(room, repeats=4, seq_length=192)
    return room / "packs"


@pytest.fixture(scope="module")
def batch(packs):
    dataset = PackDataset(packs, None, seed=0, images="patches")
    return collate([dataset[number] for number in range(2)])


def test_arms_change_one_thing_each():
    changed = {}
    for arm in {arm.name: arm for ablation in arms.ABLATIONS for arm in ablation.arms}.values():
        changed[arm.name] = {
            *arm.sizes,
            *(["mask"] if arm.mask != "mixed" else []),
            *(["positions"] if arm.positions != "native" else []),
            *(["pre_buffer"] if arm.pre_buffer is not None else []),
            *(["optimizer"] if "--optimizer" in arm.flags else []),
        }
    assert changed.pop("NEO 1.0") == set()
    assert changed.pop("experts") == {"num_experts", "experts_per_token", "expert_ffn_hidden_size"}
    assert all(len(fields) == 1 for fields in changed.values()), changed
    for ablation in arms.ABLATIONS:
        assert {name for pair in ablation.better for name in pair} <= {arm.name for arm in ablation.arms}
    # Two of the experts are as wide as the dense feed-forward of the preset.
    assert 2 * arms.EXPERTS["expert_ffn_hidden_size"] == SIZES["tiny"].ffn_hidden_size


@pytest.mark.parametrize(("mask", "positions"), product(("mixed", "causal"), ("native", "t", "sequence")))
def test_ablated_inputs_differ_in_mask_and_positions_alone(batch, mask, positions):
    plain = model_inputs(batch, first_stage=True, last_stage=True, experts=False)
    other = run.ablated(plain, mask, positions)
    changed = {name for name in plain if other[name] is not plain[name]}
    assert changed == {*(["image"] if mask == "causal" else []), *(["positions_thw"] if positions != "native" else [])}
    allowed = AttentionRule(other["document"], other["image"]).dense()
    mixed = AttentionRule(plain["document"], plain["image"]).dense()
    assert torch.equal(allowed, mixed.tril() if mask == "causal" else mixed)
    assert not torch.equal(mixed, mixed.tril())


def test_positions_in_sequence_count_the_tokens_of_each_document(batch):
    documents = batch["document"]
    expected = torch.tensor(
        [[row[:place].count(row[place]) for place in range(len(row))] for row in documents.tolist()]
    )
    assert torch.equal(run.sequence_positions(documents), expected)


class Oracle(torch.nn.Module):
    """Says for every target the right token, but for the first target of the documents given."""

    def __init__(self, wrong: set[int], batches: list):
        super().__init__()
        self.config = type("Config", (), {"sizes": type("Sizes", (), {"num_experts": None})})
        self.wrong, self.batches = wrong, batches

    def forward(self, target_index, document, **_):
        batch = next(batch for batch in self.batches if torch.equal(batch["document"], document))
        logits = torch.nn.functional.one_hot(batch["targets"]).float()
        first = torch.tensor([self.first(batch, place) for place in sorted(self.wrong)])
        logits[first] = -logits[first]
        return logits

    @staticmethod
    def first(batch, document: int) -> int:
        return int((batch["document"].flatten()[batch["target_index"]] == document).nonzero()[0])


def test_an_answer_is_right_if_all_its_tokens_are(packs, monkeypatch):
    monkeypatch.setattr(run, "PACKS_AT_ONCE", 1)
    dataset = PackDataset(packs, None, seed=0, images="patches")
    batches = [collate([dataset[number]]) for number in range(len(dataset))]
    answered = run.answer(Oracle({0}, batches), packs, "mixed", "native")
    wrong = {dataset.describe(number)[0][1] for number in range(len(dataset))}
    records = sorted(record for number in range(len(dataset)) for _, record in dataset.describe(number))
    assert 0 < len(wrong) < len(set(records))
    assert answered["right"] == [record not in wrong for record in sorted(set(records))]


def finished_run(directory, right: list[bool], loss: float) -> None:
    for part, steps in (("shapes", 10), ("questions", 30)):
        with SummaryWriter(directory / part / "tensorboard") as writer:
            for step in range(5, steps + 1, 5):
                writer.add_scalar("lm loss", 1 / step, step)
    (directory / "answers.json").write_text(json.dumps({"loss": loss, "right": right}))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Finished runs of two arms with three seeds: 4, 4 and 3 of 4 answers against 3, 3 and 2."""
    output = tmp_path_factory.mktemp("output")
    (output / "data").mkdir()
    asked = ["what shape is in the image?", "what color is the shape?", "is there a circle?", "is there a red shape?"]
    records = [
        {
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": ("circle", "red", "yes", "yes")[number]},
            ],
        }
        for number, question in enumerate(asked)
    ]
    (output / "data" / "test.json").write_text(json.dumps(records))
    for seed, (better, worse) in zip((1234, 1235, 1236), ((4, 3), (4, 3), (3, 2)), strict=True):
        for name, right in (("NEO 1.0", better), ("causal mask", worse)):
            finished_run(output / "runs" / name / str(seed), [place < right for place in range(4)], loss=0.5 / right)
    return output


def test_runs_are_read_back_as_they_were_written(output):
    runs = results.read_runs(output)
    assert {name: [run.seed for run in mine] for name, mine in runs.items() if mine} == {
        "NEO 1.0": [1234, 1235, 1236],
        "causal mask": [1234, 1235, 1236],
    }
    last = runs["causal mask"][2]
    assert (last.accuracy, last.loss) == (0.5, 0.25)
    assert sorted(last.by_kind) == sorted(KINDS) and mean(last.by_kind.values()) == 0.5
    assert [step for step, _ in last.curve] == [5, 10, 15, 20, 25, 30, 35, 40]  # one axis for both trainings


def test_intervals_are_those_of_student():
    estimate = results.Estimate.of([1.0, 2.0, 4.0])
    # scipy.stats.t.interval(0.95, 2, mean([1, 2, 4]), sem([1, 2, 4]))
    assert estimate.mean - estimate.half == pytest.approx(-1.4612503, abs=2e-3)
    assert estimate.mean + estimate.half == pytest.approx(6.1279170, abs=2e-3)
    assert math.isnan(results.Estimate.of([1.0]).half)
    assert results.shown(results.Estimate.of([1.0]), 1) == "1.0"


def seeds(*accuracies: float) -> list[results.Run]:
    return [results.Run(seed, accuracy, {}, 0.0, []) for seed, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("better", "worse", "word"),
    [
        ((0.9, 0.8, 0.7), (0.8, 0.71, 0.6), "holds"),  # by seed, although the arms overlap
        ((0.8, 0.71, 0.6), (0.9, 0.8, 0.7), "does not hold"),
        ((0.9, 0.8, 0.7), (0.8, 0.85, 0.6), "not decided"),
        ((0.9,), (0.1,), "not decided"),  # one seed has no interval
    ],
)
def test_an_order_holds_only_outside_of_its_interval(better, worse, word):
    assert results.verdict(seeds(*better), seeds(*worse))[1] == word


def test_tables_and_page_show_the_runs(output):
    runs, mask = results.read_runs(output), arms.ABLATIONS[0]
    heading, first, second = results.table(mask, runs)
    assert heading[:3] == ["arm", "seeds", "accuracy"]
    assert [first[0], second[0]] == ["NEO 1.0", "causal mask"]
    assert first[2].startswith("91.7 ± ") and second[2].startswith("66.7 ± ")
    assert results.verdicts(mask, runs) == [["NEO 1.0 > causal mask", "25.0 ± 0.0", "holds"]]
    html = page.page(runs, 40)
    assert html.count("<polyline") == html.count("<polygon")  # a curve and a band for each arm
    for ablation in arms.ABLATIONS:  # all contain NEO 1.0, but for the depths, which have no run
        assert (ablation.question.split(",")[0] in html) == (ablation.name != "depth")


def test_runs_that_exist_are_kept_and_those_of_another_length_refused(output):
    waiting = compare.jobs([arms.ABLATIONS[0]], 4, output, 40)
    assert [(job.arm.name, job.seed) for job in waiting] == [("NEO 1.0", 1237), ("causal mask", 1237)]
    every = compare.jobs(list(arms.ABLATIONS), 1, output, 40)
    assert len(every) == len({job.directory for job in every}) == 11  # 13 arms, of which two are finished
    compare.check_steps(output, 40)
    compare.check_steps(output, 40)
    with pytest.raises(ConfigError, match="has runs of 40 steps: give another --output, or these --steps"):
        compare.check_steps(output, 50)


def test_texts_are_questions_and_answers_without_the_image():
    record = {"conversations": [{"from": "human", "value": "<image>\nwhat color?"}, {"from": "gpt", "value": "red"}]}
    turns = [[turn["value"] for turn in made["conversations"]] for made in inputs.texts([record])]
    assert turns == [["what color?", "red"], ["red", "what color?"]]


def test_help_needs_no_data():

    script = TOOLS.parent / "examples" / "ablations" / "compare.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--steps" in done.stdout and "4 hours" in done.stdout
