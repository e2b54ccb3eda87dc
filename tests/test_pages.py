"""The pages that the tools and the quickstart write, on a phone: nothing is wider than the screen.

The demo's page is tested in `examples/test_demo.py`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from answers.page import page as answers_page
from conftest import GOLDEN
from golden_packs import TOOLS, make_packs

from neo_megatron.inference.evaluation import Evaluation, Scores

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = 390  # CSS pixels
LONG = "a_name_without_any_place_to_break_it_" * 4


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


def inspected(room: Path) -> Path:
    output = room / "inspect.html"
    words = [TOOLS / "inspect_data.py", "--packs", room / "packs", "--tokenizer", GOLDEN / "tokenizer"]
    subprocess.run([sys.executable, *map(str, words), "--output", str(output)], check=True)
    return output


def evaluated(room: Path) -> Path:
    def line(number: int) -> dict:
        return {
            **{"data_set": LONG, "file": f"/data/{LONG}.json", "record": number, "element": None, "turn": 1},
            **{"question": f"What is in the image? {LONG}", "prediction": LONG, "references": ["b", LONG]},
            **{"pictures": [str(GOLDEN / "images" / "c.png")], "finished": True, "exact_match": False, "anls": 0.1},
        }

    lines = [line(number) for number in range(6)]
    scores = Scores.of(lines)
    rejects = [{"file": f"/data/{LONG}.json", "record": 1, "element": None, "kind": "missing picture", "reason": LONG}]
    output = room / "report.html"
    output.write_text(
        answers_page(Evaluation(lines, rejects, scores, {LONG: scores, "docvqa": scores}), f"runs/{LONG}")
    )
    return output


def learned(room: Path) -> Path:
    """The report of the quickstart."""
    sys.path.insert(0, str(TOOLS.parent / "examples" / "quickstart"))
    import report
    from questions import Question
    from training_runs import TrainingRun

    settings = dict.fromkeys(report.SETTINGS.values(), "hybrid_transformer_engine") | {"world_size": "2"}
    loss = [(step, 1 / step) for step in range(1, 200)]
    runs = [TrainingRun(name, settings, loss, [(100, 0.01)]) for name in ("shapes", "questions")]
    images = room / "images"
    images.mkdir()
    kinds = [
        ("what shape is in the image?", "circle"),
        ("what color is the shape?", "red"),
        ("is there a circle?", "yes"),
        ("is there a red shape?", "yes"),
    ]
    answers = []
    for number in range(60):
        shutil.copy(GOLDEN / "images" / "c.png", images / f"{number}.png")
        text, answer = kinds[number % 4]
        answers.append(report.Answer(Question(f"{number}.png", text, answer), answer if number % 5 else "no", "no"))
    output = room / "quickstart.html"
    seconds = [("Training on questions (pp2), which takes longest", 61)]
    output.write_text(report.page(answers, images, runs, seconds, 1234567))
    return output


@pytest.mark.parametrize("write", [inspected, evaluated, learned], ids=lambda write: write.__name__)
def test_a_page_fits_a_phone(browser, room, write):
    path = write(room)
    page = browser.new_page(viewport={"width": PHONE, "height": 844})
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE, wider_than_the_screen(page)
    # Nothing is cut off either: what is wider scrolls inside a part that is not.
    assert json.loads(page.evaluate(CUT_OFF)) == []
    page.screenshot(path=str(room / f"{path.stem}.png"), full_page=True)
    page.close()


def wider_than_the_screen(page) -> str:
    script = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    return page.evaluate(f"{script}.slice(0, 9).map(e => e.outerHTML.slice(0, 160)).join('\\n')")


CUT_OFF = """JSON.stringify([...document.querySelectorAll('main *')].filter(element => {
  if (element.getBoundingClientRect().right <= innerWidth + 1 || element.closest('svg') !== null) return false;
  for (let part = element.parentElement; part; part = part.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(part).overflowX)) return false;
  return true;
}).map(element => element.outerHTML.slice(0, 120)))"""
