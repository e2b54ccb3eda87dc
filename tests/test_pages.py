"""Pages of the tools and of the examples fit a phone, and never show untrusted text as markup.

The demo's page is tested in `examples/test_demo.py`.
"""

import base64
import contextlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from support.golden_packs import TOOLS, make_packs
from support.paths import GOLDEN
from support.processes import run_forked

from neo_megatron.follow.page import page as followed_page
from neo_megatron.inference.evaluation import Evaluation, Scores
from neo_megatron.inference.report_page import page as answers_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = 390  # CSS pixels
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # a PNG of one
)
LONG = "a_name_without_any_place_to_break_it_" * 4
NAME = "<img src=x onerror=window.ran=1>"  # a file may be called so
MARKUP = " ".join(
    [
        NAME,
        "<script>window.ran=1</script></script><script>window.ran=1</script>",
        "'\"><svg onload=window.ran=1></textarea></title></style><iframe srcdoc='<script>parent.ran=1</script>'>",
        "--><a href=javascript:window.ran=1 autofocus onfocus=window.ran=1>$title ${model}",
    ]
)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    room = tmp_path_factory.mktemp("pages") / LONG[:60]
    room.mkdir()
    make_packs(room, repeats=8, seq_length=192)
    return room


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def marked_room(tmp_path_factory) -> Path:
    """Packs of records whose every text and name is markup, one of which is rejected."""
    room = tmp_path_factory.mktemp("markup") / NAME
    room.mkdir()
    shutil.copy(GOLDEN / "images" / "c.png", room / f"{NAME}.png")
    records = [
        {
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{MARKUP}"},
                {"from": "gpt", "value": MARKUP},
            ],
        }
        for image in (f"{NAME}.png", MARKUP)
    ]
    (room / f"{NAME}.json").write_text(json.dumps(records))
    with contextlib.chdir(room):
        for tool, *words in (
            ("preprocess_data.py", "--input", f"{NAME}.json", "--image-root", ".", "--tokenizer", GOLDEN / "tokenizer")
            + ("--output", "shards", "--min-pixels", 4096, "--max-pixels", 65536, "--workers", 1, "--max-rejected", 99),
            ("pack_data.py", "--data", "shards", "--output", "packs", "--seq-length", 2048),
        ):
            run(tool, *words)
    return room


def run(tool: str, *words: object) -> None:
    done = run_forked(TOOLS / tool, *words)
    assert done.returncode == 0, done.stdout


def inspected(room: Path, text: str) -> Path:
    output = room / "inspect.html"
    words = ("--packs", room / "packs", "--tokenizer", GOLDEN / "tokenizer")
    run("inspect_data.py", *words, "--output", output)
    return output


def evaluated(room: Path, text: str) -> Path:
    def line(number: int) -> dict:
        return {
            **{"data_set": text, "file": f"/data/{text}.json", "record": number, "element": None, "turn": 1},
            **{"question": f"What is in the image? {text}", "prediction": text, "references": ["b", text]},
            **{"pictures": [str(GOLDEN / "images" / "c.png")], "finished": True, "exact_match": False, "anls": 0.1},
        }

    lines = [line(number) for number in range(6)]
    scores = Scores.of(lines)
    rejects = [{"file": f"/data/{text}.json", "record": 1, "element": None, "kind": "missing picture", "reason": text}]
    output = room / "report.html"
    output.write_text(
        answers_page(Evaluation(lines, rejects, scores, {text: scores, "docvqa": scores}), f"runs/{text}")
    )
    return output


def followed(room: Path, text: str) -> Path:
    def line(number: int, prediction: str) -> dict:
        return {
            **{"data_set": text, "file": f"/data/{text}.json", "record": number, "element": None, "turn": 1},
            **{"question": f"What is in the image? {text}", "prediction": prediction, "references": ["b", text]},
            **{"pictures": [str(GOLDEN / "images" / "c.png")], "finished": True, "exact_match": False, "anls": 0.1},
        }

    scores = {"questions": 6, "exact_match": 0.5, "anls": 0.7, "cut": 0}
    steps = range(1_000_000, 1_900_000, 100_000)
    names = (text, "docvqa", "chartqa")
    rows = [{"step": step, **scores, "data_sets": dict.fromkeys(names, scores)} for step in steps]
    sample = {"data_set": text, "question": text, "answer": text, "references": [text], "grid": [2, 3], "share": 0.25}
    sample |= {"levels": base64.b64encode(bytes(range(0, 240, 40))).decode(), "image": f"data:image/png;base64,{PIXEL}"}
    answers = [[line(number, said) for number in range(6)] for said in (text, f"{text} again")]
    output = room / "followed.html"
    attention = dict.fromkeys((steps[0], steps[-1]), [sample] * 3)
    output.write_text(followed_page(f"runs/{text}", rows, [steps[-1]], answers, attention))
    return output


def learned(room: Path, text: str) -> Path:
    """The report of the quickstart."""
    sys.path.insert(0, str(TOOLS.parent / "examples" / "quickstart"))
    import report
    from questions import Question
    from training_runs import TrainingRun

    settings = dict.fromkeys(report.SETTINGS.values(), "hybrid_transformer_engine") | {"world_size": "2"}
    loss = [(step, 1 / step) for step in range(1, 200)]
    deltas = [(100, 0.5)], [(100, 0.4)]
    runs = [TrainingRun(name, settings, loss, [(100, 0.01)], deltas) for name in ("shapes", "questions")]
    images = room / "images"
    images.mkdir(exist_ok=True)
    kinds = [
        ("what shape is in the image?", "circle"),
        ("what color is the shape?", "red"),
        ("is there a circle?", "yes"),
        ("is there a red shape?", "yes"),
    ]
    answers = []
    for number in range(60):
        shutil.copy(GOLDEN / "images" / "c.png", images / f"{number}.png")
        question, answer = kinds[number % 4]
        answered = answer if number % 5 else text
        answers.append(report.Answer(Question(f"{number}.png", question, answer), answered, "no"))
    output = room / "quickstart.html"
    seconds = [("Training on questions (pp2), which takes longest", 61)]
    output.write_text(report.page(answers, images, runs, seconds, 1234567))
    return output


def ablated(room: Path, text: str) -> Path:
    """The page of the ablations."""
    sys.path.insert(0, str(TOOLS.parent / "examples" / "ablations"))
    import arms
    import page
    import results

    runs = {
        arm.name: [
            results.Run(seed, seed / 4, dict.fromkeys(results.KINDS, 0.9), 0.1, [(5, 3.0), (10, 1.0), (15, 0.02)])
            for seed in (1, 2, 3)
        ]
        for ablation in arms.ABLATIONS
        for arm in ablation.arms
    }
    output = room / "ablations.html"
    output.write_text(page.page(runs, 15))
    return output


@pytest.mark.parametrize("write", [inspected, evaluated, followed, learned, ablated], ids=lambda write: write.__name__)
def test_a_page_fits_a_phone(browser, room, write):
    path = write(room, LONG)
    page = browser.new_page(viewport={"width": PHONE, "height": 844})
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE, wider_than_the_screen(page)
    # Nothing is cut off either: what is wider scrolls inside a part that is not.
    assert json.loads(page.evaluate(CUT_OFF)) == []
    page.screenshot(path=str(room / f"{path.stem}.png"), full_page=True)
    page.close()


@pytest.mark.parametrize("write", [inspected, evaluated, followed, learned], ids=lambda write: write.__name__)
def test_untrusted_text_is_escaped(browser, marked_room, write):
    page = browser.new_page(java_script_enabled=True)
    said = []
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(write(marked_room, MARKUP).as_uri())
    page.evaluate(POINT_AT_EVERYTHING)
    assert page.evaluate("window.ran") is None and said == []
    assert page.evaluate("document.querySelectorAll('iframe, [onload], [onerror], [onfocus], [src=x]').length") == 0
    assert "onerror=window.ran=1" in page.inner_text("body").replace("·", " ")
    page.close()


POINT_AT_EVERYTHING = """for (const element of document.querySelectorAll('body *'))
  for (const name of ['pointermove', 'pointerenter', 'mouseover', 'focus', 'click'])
    if (!element.href) element.dispatchEvent(new Event(name, { bubbles: true }))"""


def wider_than_the_screen(page) -> str:
    script = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    return page.evaluate(f"{script}.slice(0, 9).map(e => e.outerHTML.slice(0, 160)).join('\\n')")


CUT_OFF = """JSON.stringify([...document.querySelectorAll('main *')].filter(element => {
  if (element.getBoundingClientRect().right <= innerWidth + 1 || element.closest('svg') !== null) return false;
  for (let part = element.parentElement; part; part = part.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(part).overflowX)) return false;
  return true;
}).map(element => element.outerHTML.slice(0, 120)))"""
