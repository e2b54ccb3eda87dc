"""`neo-megatron evaluate`: the same answers for any batch size, worker count and interruption; its lists and page."""

import json
import os
import re
import resource
import runpy
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.paths import TOOLS

from neo_megatron.cli import evaluate
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.conversation import Turn
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import DataError
from neo_megatron.inference import batches
from neo_megatron.inference.answer_run import AnswerRun
from neo_megatron.inference.answering import Answerer
from neo_megatron.inference.evaluation import Evaluation, Scores
from neo_megatron.inference.questions import read_questions
from neo_megatron.inference.report_page import page, worst_cases

TOKENS = 4
HOSTILE = '</p></style><script>alert(1)</script><img src="http://example.org/a.png"> & "quoted"'


def human(text):
    return {"from": "human", "value": text}


def gpt(text, **keys):
    return {"from": "gpt", "value": text, **keys}


def say(answerer: Answerer, turns: list[Turn], images: list[Path]) -> str:
    """A greedy answer, every token from a complete forward without padding or cache."""
    inputs = answerer.inputs([answerer.prompt(turns, images)])
    inputs.pop("attention_mask")
    asked = inputs["input_ids"].shape[1]
    for _ in range(TOKENS):
        with torch.no_grad():
            likely = answerer.model(**inputs).logits[:, -1:].argmax(dim=-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], likely], dim=1)
    tokens = inputs["input_ids"][0, asked:].tolist()
    end = answerer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    return answerer.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def asked(answerer, golden, tmp_path_factory) -> tuple[Path, list[str]]:
    """An annotation file, and what the model says to its questions: some of it is the right answer there."""
    directory = tmp_path_factory.mktemp("asked")
    shutil.copytree(golden / "images", directory / "images")
    image = (golden / "images" / "a.png").read_bytes()
    (directory / "images" / "torn.png").write_bytes(image[: len(image) // 2])
    records, said = [], []
    for number, name in enumerate(["a.png", "b.png", "c.png", "e.png", None, None]):
        images = [directory / "images" / name] if name else []
        tag = "<image>\n" if name else ""
        turns = [Turn("user", f"{tag}What is {'so ' * 3 * number}odd?", False)]
        said.append(say(answerer, turns, images))
        right = [said[-1].upper(), "something else", HOSTILE][number % 3]
        further = [human(f"And {number}?"), gpt("nothing", answers=["none"])]
        turns += [Turn("assistant", right, False), Turn("user", further[0]["value"], False)]
        said.append(say(answerer, turns, images))
        records.append({"id": number, "conversations": [human(turns[0].text), gpt(right), *further]})
        if name:
            records[-1]["image"] = name
    twice = [human("?"), gpt("!"), human("?"), gpt("!")]
    bad = [{"image": name, "conversations": twice} for name in ("torn.png", "gone.png")]
    (directory / "asked.json").write_text(json.dumps([*records[:3], *bad, {"conversations": []}, *records[3:]]))
    return directory / "asked.json", said


@pytest.fixture(scope="module")
def run(checkpoint, asked):
    """Runs the tool in this process."""
    annotations, _ = asked

    def of(output: Path, *further: str, batch_size: int = 5, workers: int = 1) -> Path:
        flags = ["--model", checkpoint, "--input", annotations, "--image-root", annotations.parent / "images"]
        flags += ["--output", output, "--max-new-tokens", TOKENS, "--batch-size", batch_size, "--workers", workers]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), *further])
            evaluate.main()
        return output

    return of


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("evaluated") / "out")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_of_layout_u1_are_asked_without_thinking(checkpoint, asked, tmp_path, monkeypatch):
    """Further roles and tags beyond the images are read, an answer's own thinking is not scored."""
    annotations, _ = asked
    answerer = Answerer(checkpoint, device="cpu", chat_layout="u1", system="Be terse.")
    turns = [Turn("knowledge", "A fact.", False), Turn("user", "<image>\n" + r"What is \<image>?", False)]
    said = say(answerer, turns, [annotations.parent / "images" / "a.png"])
    conversation = [
        {"from": "knowledge", "value": "A fact."},
        human("<image>\nWhat is <image>?"),
        gpt(f"<think>\nIt is odd.\n</think>\n\n{said}"),
    ]
    (tmp_path / "u1.json").write_text(json.dumps([{"image": "a.png", "conversations": conversation}]))
    flags = ["--model", checkpoint, "--input", tmp_path / "u1.json", "--image-root", annotations.parent / "images"]
    flags += ["--output", tmp_path / "out", "--max-new-tokens", TOKENS, "--workers", 1, "--system", "Be terse."]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--chat-layout", "u1"])
    evaluate.main()
    (line,) = lines_of(tmp_path / "out" / "answers.jsonl")
    assert line["prediction"] == said and line["exact_match"]


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"settings": PreprocessConfig(chat_layout="u1")}, "--chat-layout"),
        ({"system": "Be terse."}, "--system"),
        ({"image_text": "numbered"}, "--image-text"),
    ],
)
def test_a_run_is_continued_only_in_the_same_form(checkpoint, changed, key):
    plain = batches.Task(checkpoint, "auto", PreprocessConfig(), TOKENS)
    plans = [batches.plan_of(task, [], "every answer") for task in (plain, replace(plain, **changed))]
    assert {name for name in plans[0] if plans[0][name] != plans[1][name]} == {key}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_answers_and_scores(evaluated, asked):
    """Of every third record the first answer is right but for the case of its letters."""
    _, said = asked
    lines = lines_of(evaluated / "answers.jsonl")
    assert [line["prediction"] for line in lines] == said
    assert [(line["record"], line["turn"]) for line in lines] == [(n, t) for n in (0, 1, 2, 6, 7, 8) for t in (1, 3)]
    assert [line["id"] for line in lines[::2]] == list(range(6)) and lines[1]["references"] == ["nothing", "none"]
    assert [line["exact_match"] for line in lines] == [True, *[False] * 5, True, *[False] * 5]
    scores = json.loads((evaluated / "scores.json").read_text())
    assert scores["questions"] == 12 and scores["exact_match"] == pytest.approx(2 / 12)
    assert scores["anls"] == pytest.approx(sum(line["anls"] for line in lines) / 12)
    assert scores["data_sets"] == {"asked": {key: scores[key] for key in ("questions", "exact_match", "anls", "cut")}}
    assert scores["cut"] == sum(not line["finished"] for line in lines) and scores["rejected_samples"] == 3


def test_samples_that_preprocessing_rejects_are_rejected(evaluated, asked, golden, tmp_path):
    """With the same words; an image whose header is intact is found to be broken when it is decoded."""
    annotations, _ = asked
    source = Source("asked", str(annotations), str(annotations.parent / "images"))
    preprocess([source], golden / "tokenizer", tmp_path / "shards", PreprocessConfig(min_pixels=4096, max_pixels=65536))
    expected = lines_of(tmp_path / "shards" / "rejects.jsonl")
    assert [entry["record"] for entry in expected] == [3, 4, 5]
    found = lines_of(evaluated / "rejects.jsonl")
    assert sorted(found, key=lambda entry: entry["record"]) == expected


def test_batches_and_workers_change_nothing(run, evaluated, tmp_path):
    assert contents(run(tmp_path / "single", batch_size=1)) == contents(evaluated)
    assert contents(run(tmp_path / "workers", workers=2)) == contents(evaluated)


def test_an_interrupted_run_resumes(run, evaluated, tmp_path, monkeypatch):
    """After a kill in its third batch, which tears a line; what is known is not asked again."""
    output, sizes, most = tmp_path / "out", [], 2
    answer = Answerer.answer

    def counting(self, prompts, *arguments, **keys):
        if len(sizes) == most:
            raise KeyboardInterrupt
        sizes.append(len(prompts))
        return answer(self, prompts, *arguments, **keys)

    monkeypatch.setattr(Answerer, "answer", counting)
    with pytest.raises(KeyboardInterrupt):
        run(output, batch_size=3)
    assert [path.name for path in output.iterdir()] == ["answers.partial.jsonl"]
    with (output / "answers.partial.jsonl").open("a") as file:
        file.write('{"results": [[["asked", 0, nu')
    most = 99
    assert contents(run(output, batch_size=4)) == contents(evaluated)
    assert sum(sizes) == 12


@pytest.fixture(scope="module")
def in_parts(asked, tmp_path_factory) -> Path:
    """The annotations of `asked` in three files, as a registry with one data set of a directory."""
    annotations, _ = asked
    folder = tmp_path_factory.mktemp("parts")
    records = json.loads(annotations.read_text())
    (folder / "asked").mkdir()
    for number, part in enumerate((records[:2], records[2:7], records[7:])):
        (folder / "asked" / f"{number}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    images = annotations.parent / "images"
    (folder / "registry.yaml").write_text(f"asked: {{annotation_path: asked, data_path: {images}}}\n")
    return folder


@pytest.mark.parametrize("given", ["directory", "glob", "files", "registry"])
def test_a_data_set_may_have_several_files(checkpoint, asked, evaluated, in_parts, given, tmp_path, monkeypatch):
    """The answers and scores are those of one file; a run that is interrupted in the second file resumes."""
    annotations, _ = asked
    paths = sorted((in_parts / "asked").iterdir())
    inputs = {"directory": [in_parts / "asked"], "glob": [in_parts / "asked" / "*.jsonl"], "files": paths}
    flags = ["--registry", in_parts / "registry.yaml", "--datasets", "asked"]
    if given != "registry":
        flags = ["--input", *inputs[given], "--image-root", annotations.parent / "images"]
    flags += ["--model", checkpoint, "--output", tmp_path / "out", "--max-new-tokens", TOKENS, "--workers", 1]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--batch-size", "5"])
    answer, sizes = Answerer.answer, []

    def counting(self, prompts, *arguments):
        if len(sizes) == 1:
            sizes.append(0)
            raise KeyboardInterrupt
        sizes.append(len(prompts))
        return answer(self, prompts, *arguments)

    monkeypatch.setattr(Answerer, "answer", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main()
    evaluate.main()
    assert sum(sizes) == 12
    lines, expected = (lines_of(directory / "answers.jsonl") for directory in (tmp_path / "out", evaluated))
    assert [line | {"file": "", "record": 0, "data_set": ""} for line in lines] == [
        line | {"file": "", "record": 0, "data_set": ""} for line in expected
    ]
    places = [(Path(line["file"]).name, line["record"]) for line in lines[::2]]
    assert places == [("0.jsonl", 0), ("0.jsonl", 1), ("1.jsonl", 0), ("1.jsonl", 4), ("2.jsonl", 0), ("2.jsonl", 1)]
    assert len({(line["file"], line["record"], line["turn"]) for line in lines}) == 12
    scores, alone = (json.loads((d / "scores.json").read_text()) for d in (tmp_path / "out", evaluated))
    assert [*scores["data_sets"].values()] == [*alone["data_sets"].values()] and len(scores["data_sets"]) == 1
    assert [(Path(r["file"]).name, r["record"]) for r in lines_of(tmp_path / "out" / "rejects.jsonl")] == [
        ("1.jsonl", 2),
        ("1.jsonl", 3),
        ("1.jsonl", 1),
    ]
    assert "1.jsonl, record 4" in (tmp_path / "out" / "report.html").read_text()


def test_other_files_of_a_data_set_are_another_run(checkpoint, in_parts, tmp_path, monkeypatch):
    flags = ["--model", checkpoint, "--output", tmp_path / "out", "--max-new-tokens", TOKENS, "--workers", 1]
    paths = sorted((in_parts / "asked").iterdir())

    def killed(self, *_):
        self.add([])
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerRun, "finish", killed)
    for files, error in ((paths, KeyboardInterrupt), (paths[:2], DataError)):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--input", *map(str, files)])
        with pytest.raises(error) as raised:
            evaluate.main()
    assert "with another list of annotation files, root or share of 0; repeat" in str(raised.value)


def test_images_have_the_limits_of_their_data_set(checkpoint, asked, tmp_path, monkeypatch):
    """Of the registry where it has them, else those of the flags; other limits are another run."""
    annotations, _ = asked
    entry = {"annotation_path": str(annotations), "data_path": str(annotations.parent / "images")}
    registry = tmp_path / "registry.yaml"
    grids: list[tuple[int, int]] = []

    def first_grids(self, prompts, *_):
        if len(grids) > 8:
            raise KeyboardInterrupt
        grids.extend(grid for prompt in prompts for grid in prompt.grids)
        return answer(self, prompts, *_)

    answer = Answerer.answer
    monkeypatch.setattr(Answerer, "answer", first_grids)
    flags = ["--registry", registry, "--datasets", "own", "flags", "--model", checkpoint, "--output", tmp_path / "out"]
    flags += ["--max-new-tokens", TOKENS, "--workers", 1, "--batch-size", 12, "--max-pixels", 16384]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    registry.write_text(json.dumps({"own": entry | {"min_pixels": 65536, "max_pixels": 65536}, "flags": entry}))
    with pytest.raises(KeyboardInterrupt):
        evaluate.main()
    areas = [height * width * 256 for height, width in grids]  # the longest questions come first
    assert min(areas[:8]) > 40000 and len(areas) > 8 and max(areas[8:]) <= 16384
    registry.write_text(json.dumps({"own": entry | {"min_pixels": 32768, "max_pixels": 65536}, "flags": entry}))
    with pytest.raises(DataError, match="unfinished run with another limit of images or videos of own"):
        evaluate.main()


def test_only_one_run_uses_a_directory(run, evaluated, tmp_path):
    with pytest.raises(DataError, match="already holds answers"):
        run(evaluated)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DataError, match="is not empty; choose another --output"):
        run(tmp_path / "mine")
    with AnswerRun(tmp_path / "busy", {}), pytest.raises(DataError, match="another run is writing to"):
        run(tmp_path / "busy")


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    """Of the files that were being written when the run ended, but nothing else."""
    with AnswerRun(tmp_path, {}) as run:
        pass
    for name in ("answers.jsonl.0123abcd.partial", "report.html.ffffffff.partial", "mine.partial"):
        (tmp_path / name).touch()
    with AnswerRun(tmp_path, {}) as run:
        run.finish({"answers.jsonl": b""})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "mine.partial"]


def test_an_interrupted_batch_is_asked_again_completely(tmp_path):
    """A question's sampled answer depends on those of its batch, so none of them may be left over alone."""
    batches = [[(("d", number, None, 1), {"prediction": "x"}) for number in pair] for pair in ((0, 1), (2, 3))]
    with AnswerRun(tmp_path / "out", {}) as run:
        for batch in batches:
            run.add(batch)
    progress = tmp_path / "out" / "answers.partial.jsonl"
    progress.write_bytes(progress.read_bytes()[:-2])
    with AnswerRun(tmp_path / "out", {}) as run:
        assert run.done == dict(batches[0])


def test_a_full_disk_is_reported(tmp_path):
    """Here a limit on the size of files: what fits is kept, the rest is asked again."""
    first, second = ([(("d", number, None, 1), {"prediction": "x" * 5000})] for number in range(2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        said = r"partial.jsonl cannot be written \(File too large\); remedy that, then run"
        with pytest.raises(DataError, match=said), AnswerRun(tmp_path / "out", {}) as run:
            run.add(first)
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
            run.add(second)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    with AnswerRun(tmp_path / "out", {}) as run:
        assert run.done == dict(first)


def test_a_run_resumes_only_with_the_same_command(run, evaluated, asked, tmp_path, monkeypatch):
    """Unless it has no answer yet: then another command replaces it."""
    answer, sizes, most = Answerer.answer, [], 0

    def counting(self, prompts, *arguments):
        if len(sizes) == most:
            raise KeyboardInterrupt
        sizes.append(len(prompts))
        return answer(self, prompts, *arguments)

    monkeypatch.setattr(Answerer, "answer", counting)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "half", "--max-pixels", "16384")
    most = 1
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "half")
    with pytest.raises(DataError, match="unfinished run with another --max-pixels; repeat its command"):
        run(tmp_path / "half", "--max-pixels", "16384")
    annotations, _ = asked
    annotations.touch()
    with pytest.raises(DataError, match="unfinished run with another list of annotation files, root"):
        run(tmp_path / "half")


def test_names_that_are_not_unicode(checkpoint, tmp_path, monkeypatch):
    """Linux takes any bytes in the name of a file, and the name of a data set is that of its file."""
    annotations = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    annotations.write_text(json.dumps({"conversations": [human("Hi"), gpt("Hello")]}) + "\n")
    flags = ["--model", checkpoint, "--input", annotations, "--output", tmp_path / "out", "--max-new-tokens", "1"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--workers", "1"])
    evaluate.main()
    assert r"caf\udce9" in (tmp_path / "out" / "report.html").read_text()


def test_a_dead_worker_is_reported(checkpoint, monkeypatch):
    """One that ends while it starts; `test_worker_pool` kills one in the middle of an item."""
    monkeypatch.setattr(batches, "_prepare", os.abort)
    task = batches.Task(checkpoint, "auto", PreprocessConfig(), TOKENS)
    with pytest.raises(DataError, match="a worker died; run the same command again to continue, with fewer --workers"):
        list(batches._on_processes(task, [([], 0)], 1))


def test_longest_questions_come_first(asked):
    """So that a memory that is too small shows at once."""
    annotations, _ = asked
    source = Source("asked", str(annotations), str(annotations.parent / "images"))
    questions = read_questions([source], PreprocessConfig(), "every answer").questions
    order = [questions[number].length for batch in batches.make_batches(questions, 4) for number in batch]
    assert order == sorted(order, reverse=True) and order[0] > order[-1]


def test_errors_are_one_sentence(tmp_path, monkeypatch):
    tool = TOOLS / "evaluate.py"
    monkeypatch.setattr(sys, "argv", [str(tool), "--input", "none.json", "--model", str(tmp_path), "--output", "out"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name="__main__")
    assert re.fullmatch(r"evaluate: --input none.json does not exist: .*", ended.value.code)


def case(**keys):
    return {
        **{
            "data_set": "d",
            "file": "d.json",
            "record": 0,
            "element": None,
            "turn": 1,
            "id": None,
            "pictures": [],
            "question": "?",
        },
        **{"prediction": "a", "finished": True, "references": ["b"], "exact_match": False, "anls": 0.0, **keys},
    }


def test_the_report_page(evaluated, asked):
    html = (evaluated / "report.html").read_text()
    assert html.count("<img ") == html.count('src="data:image/jpeg;base64,') == 6
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html
    assert "torn.png" in html and "gone.png" in html and "empty conversation" in html
    addresses = re.findall(r'(?:src|href)="(.{5})', html)
    assert set(addresses) == {"data:"} and "url(" not in html


def test_the_report_page_escapes_everything(tmp_path):
    """Also what cannot hold such text in a file of the test above."""
    line = case(data_set=HOSTILE, question=HOSTILE, prediction=HOSTILE, **{"pictures": [f"{tmp_path}/{HOSTILE}"]})
    scores = Scores.of([line])
    rejects = [{"file": HOSTILE, "record": 1, "element": None, "kind": HOSTILE, "reason": HOSTILE}]
    html = page(Evaluation([line], rejects, scores, {HOSTILE: scores}), HOSTILE)
    assert "<script" not in html and "<img" not in html and html.count("</style>") == 1


def test_a_question_is_shown_as_the_model_reads_it():
    line = case(question="<image>\n" + r"Is \<image> a tag?")
    html = page(Evaluation([line], [], Scores.of([line]), {}), "neo")
    assert "<p>Is &lt;image&gt; a tag?</p>" in html


def test_the_worst_come_first(tmp_path):
    lines = [case(record=number, anls=number % 10 / 10) for number in range(200)]
    shown = worst_cases(lines, 30)
    assert [line["anls"] for line in shown] == [0.0] * 20 + [0.1] * 10
    assert shown == worst_cases(lines, 30) and [line["record"] for line in shown[:20]] != list(range(0, 200, 10))
    Image.new("RGB", (2000, 10)).save(tmp_path / "wide.png")
    many = case(**{"pictures": [str(tmp_path / "wide.png")] * 6})
    html = page(Evaluation([many], [], Scores.of([many]), {}), "neo")
    assert html.count("<img ") == 4 and "and 2 more images" in html
