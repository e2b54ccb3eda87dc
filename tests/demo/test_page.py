"""The demo in a browser: upload, ask, words and heat map come; weights against a dense computation; what is refused."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from support.demo_server import served
from support.markers import every_variant

from neo_megatron.demo.talk import Talk
from neo_megatron.demo.words import words_of
from neo_megatron.inference.answering import Answerer, Piece

QUESTION = "What is in the image? <img src=x onerror=alert(1)>"
MAX_NEW_TOKENS = 160
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def dense(checkpoint: Path, image: Path) -> tuple[list[Piece], torch.Tensor]:
    """The answer's pieces; how much each of its tokens looks at each of the image's, `[layers, tokens, image_tokens]`.

    From all weights of the complete sequence, computed at once by the eager kernel, without a cache.
    """
    answerer = Answerer(checkpoint, device="cpu", attention="eager")
    prompt = answerer.prompt(QUESTION, [image])
    pieces = list(answerer.stream(prompt, MAX_NEW_TOKENS))
    answer = [token for piece in pieces for token in piece.tokens]
    inputs = answerer.inputs([prompt])
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    del inputs["attention_mask"]
    with torch.inference_mode():
        weights = answerer.model(**inputs, output_attentions=True).attentions
    image_tokens = inputs["input_ids"][0] == answerer.config.img_context_token_id
    generated_from = slice(length - 1, length - 1 + len(answer))
    return pieces, torch.stack([layer[0].mean(dim=0)[generated_from][:, image_tokens] for layer in weights])


@every_variant
def test_the_rows_of_an_answer_are_those_of_all_weights(checkpoint, image, dense):
    pieces, expected = dense
    talk = Talk(Answerer(checkpoint, device="cpu"))
    *_, answer = talk.answers(QUESTION, str(image), 0, MAX_NEW_TOKENS)
    assert answer.pieces == pieces and expected.shape[1:] == (MAX_NEW_TOKENS, np.prod(talk.image_view(image)["grid"]))
    for layer in range(talk.layers):
        torch.testing.assert_close(answer.rows.of_layer(layer)[:MAX_NEW_TOKENS], expected[layer], atol=1e-6, rtol=1e-4)
    assert answer.note == f"Cut at {MAX_NEW_TOKENS} tokens."
    answer.layer = 1
    view, means = answer.view(), [expected[1][word.tokens].mean(dim=0) for word in words_of(pieces)]
    for seen, mean in zip([*view["words"], view["all"]], [*means, torch.stack(means).mean(dim=0)], strict=True):
        levels = np.frombuffer(base64.b64decode(seen["levels"]), np.uint8)
        assert np.abs(levels - (mean / mean.max() * 255).numpy()).max() <= 0.51
        assert [seen["top"], seen["share"]] == pytest.approx([float(mean.max()), float(mean.sum())], rel=1e-4)


def test_a_text_without_an_image_has_no_heat_map_and_a_stopped_answer_ends(checkpoint):
    talk = Talk(Answerer(checkpoint, device="cpu"))
    lengths = []
    for answer in talk.answers("Hello?", None, 0, MAX_NEW_TOKENS):
        lengths.append(len(answer.pieces))
        answer.stopped = len(answer.pieces) == 3
    assert lengths == [0, 1, 2, 3, 3] and not answer.running and not answer.note
    assert all(word.keys() == {"text"} for word in answer.view()["words"])


def test_an_answer_that_nobody_reads_any_more_frees_the_model(checkpoint, image, dense):
    pieces, expected = dense
    talk = Talk(Answerer(checkpoint, device="cpu"))
    left = talk.answers("Hello?", None, 0, 1000)
    assert len([next(left) for _ in range(5)]) == 5
    left.close()
    *_, answer = talk.answers(QUESTION, str(image), 0, MAX_NEW_TOKENS)
    assert answer.pieces == pieces
    torch.testing.assert_close(answer.rows.of_layer(0)[:MAX_NEW_TOKENS], expected[0], atol=1e-6, rtol=1e-4)


def test_pieces_are_grouped_into_words():
    texts = ["A", " b", "ird", ",", "\n", "", "👩", " 你", "好", "。"]
    pieces = [Piece(text, (0, 0, 0) if text == "👩" else (0,)) for text in texts]
    words = words_of(pieces)
    assert [word.text for word in words] == ["A", " bird,", "\n👩", " 你", "好。"]
    assert [word.tokens for word in words] == [[0], [1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
    assert words_of([]) == []


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    """The page, served by the command that a user runs, with a limit of 1 MB."""
    pytest.importorskip("gradio", reason="gradio is not installed: tools/environment.sh adds it")
    with served(checkpoint, "--max-upload-mb", "1", "--max-new-tokens", str(MAX_NEW_TOKENS)) as server:
        listening = [c.laddr.ip for c in server.process.net_connections() if c.status == "LISTEN"]
        assert listening == ["127.0.0.1"]
        yield server.address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    flags = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
    with playwright.sync_playwright() as started:
        profile = tmp_path_factory.mktemp("profile")
        context = started.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=[*flags, "--disable-sync"], viewport={"width": 1280, "height": 900}
        )
        yield context
        context.close()


@pytest.fixture
def page(browser, address) -> Iterator:
    """A fresh page. No script on it may fail, and it may load nothing from elsewhere."""
    opened = browser.new_page()
    opened.set_default_timeout(60_000)
    trouble, requested = [], []
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("dialog", lambda dialog: trouble.append(dialog.message))
    opened.on("request", lambda request: requested.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#image .empty")
    yield opened
    opened.close()
    assert trouble == []
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []


def wait_for_text(page, selector: str, text: str) -> None:
    page.wait_for_function("([at, text]) => document.querySelector(at).innerText.includes(text)", arg=[selector, text])


def brightest(page) -> int:
    """The token of the image at which the heat map is brightest."""
    pixels = page.evaluate(
        """() => {
            const canvas = document.querySelector("#image canvas");
            return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
        }"""
    )
    return int(np.array(pixels).reshape(-1, 4)[:, :3].sum(axis=1).argmax())


def test_an_upload_a_question_and_the_heat_map(page, image, dense):
    pieces, weights = dense
    words = words_of(pieces)
    page.set_input_files("input[type=file]", image)
    page.wait_for_selector("#image img[src^='data:image/jpeg']")
    height, width = np.array(Image.open(image).size[::-1])
    assert f"c.png: {width} × {height} pixels" in page.inner_text("#image .facts")
    # What the answer looked like each time it was drawn.
    page.evaluate(
        """() => {
            window.drawn = [];
            new MutationObserver(() => window.drawn.push([
                document.querySelectorAll("#answer .words span").length,
                document.querySelector("#answer .running") !== null,
                !document.querySelector("#image canvas").hidden,
            ])).observe(document.querySelector("#answer .words"), { childList: true, subtree: true });
        }"""
    )
    page.fill("#question textarea", QUESTION)
    page.press("#question textarea", "Enter")
    page.wait_for_selector("#answer .words span")
    page.wait_for_selector("#answer .card:not(.running)")
    assert page.inner_text("#answer .words").split() == "".join(piece.text for piece in pieces).split()
    drawn = page.evaluate("window.drawn")
    assert len({count for count, _, _ in drawn}) > 1, "the answer came at once"

    layer = int(page.input_value("#layer input[type=number]"))
    for shown in (layer, 1):
        page.fill("#layer input[type=number]", str(shown))
        page.press("#layer input[type=number]", "Enter")
        means = torch.stack([weights[shown - 1][word.tokens].mean(dim=0) for word in words])
        places = [0, int((means.argmax(dim=1) != means[0].argmax()).nonzero()[0])]
        for number in places:
            page.locator("#answer .words span").nth(number).hover()
            share = f"{float(f'{100 * means[number].sum():.2g}'):g} %"
            page.wait_for_function(
                "share => document.querySelector('#answer .facts').innerText.includes(share)", arg=share
            )
            assert brightest(page) == means[number].argmax()
        page.locator("h1").hover()
        assert "Entire answer" in page.inner_text("#answer .facts")
        assert brightest(page) == means.mean(dim=0).argmax()


def test_the_page_fits_a_phone(page, image):
    """With an answer and its heat map: nothing is wider than 390 CSS pixels."""
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_input_files("input[type=file]", image)
    page.wait_for_selector("#image img[src^='data:image/jpeg']")
    page.fill("#question textarea", "a_word_without_any_place_to_break_it_" * 4)
    page.click("#ask")
    page.wait_for_selector("#answer .card:not(.running) .words span")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wider = (
        "[...document.querySelectorAll('#sides *, header')].filter(e => e.getBoundingClientRect().right > 391).length"
    )
    assert page.evaluate(wider) == 0


def test_a_new_image_stops_the_answer_about_the_old_one(page, image, golden):
    page.set_input_files("input[type=file]", image)
    wait_for_text(page, "#image .facts", "c.png")
    page.fill("#question textarea", QUESTION)
    page.click("#ask")
    page.wait_for_selector("#answer .running .words span")
    page.set_input_files("input[type=file]", golden / "images" / "d.png")
    wait_for_text(page, "#image .facts", "d.png")
    page.wait_for_selector("#answer .card:not(.running)")
    page.wait_for_function("() => !document.querySelector('#answer .words span')")
    assert page.is_hidden("#image canvas")


def test_images_that_preprocessing_rejects_are_refused(page, tmp_path):
    (tmp_path / "no image.png").write_text("text")
    Image.new("RGB", (900, 3)).save(tmp_path / "long.png")
    for name, sentence in (("no image.png", "is in none of the formats"), ("long.png", "aspect ratio")):
        page.set_input_files("input[type=file]", tmp_path / name)
        page.wait_for_function(
            "text => document.querySelector('#image .refused').innerText.includes(text)", arg=sentence
        )
        assert page.is_hidden("#image img")
    (tmp_path / "large.png").write_bytes(bytes((1 << 20) + 1))
    page.set_input_files("input[type=file]", tmp_path / "large.png")
    page.wait_for_selector("text=exceed the maximum allowed size")


def test_an_image_can_be_dropped(page, image):
    page.evaluate(
        """base64 => {
            const bytes = Uint8Array.from(atob(base64), character => character.charCodeAt(0));
            const files = new DataTransfer();
            files.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            const drop = { bubbles: true, cancelable: true, dataTransfer: files };
            document.body.dispatchEvent(new DragEvent("drop", drop));
        }""",
        base64.b64encode(image.read_bytes()).decode(),
    )
    wait_for_text(page, "#image .facts", "dropped.png")


def test_the_server_keeps_its_limits_without_the_page(address, image):
    files = {"files": ("large.png", bytes((1 << 20) + 1))}
    assert requests.post(f"{address}/gradio_api/upload", files=files, timeout=20).status_code == 413
    page = requests.get(address, timeout=20)
    assert page.status_code == 200 and "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert requests.get(address, headers={"Host": "elsewhere.example"}, timeout=20).status_code == 400
    # A request that names a file which nobody uploaded.
    job = {
        "fn_index": 0,
        "session_hash": "test",
        "data": [{"path": str(image), "meta": {"_type": "gradio.FileData"}}, None],
    }
    requests.post(f"{address}/gradio_api/queue/join", json=job, timeout=20).raise_for_status()
    events = requests.get(f"{address}/gradio_api/queue/data?session_hash=test", stream=True, timeout=20).iter_lines()
    done = next(event for event in events if b"process_completed" in event)
    assert b"it was not uploaded by a user" in done and b"data:image" not in done
