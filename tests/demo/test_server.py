"""The demo's server alone with what a browser would not send, with many visitors, and for a long time."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from support.demo_server import Server, Visitor, served

from neo_megatron.cli import demo

LIMIT_MB = 1


def test_the_form_of_prompts_is_passed_on(monkeypatch, checkpoint):
    class Loaded(Exception):
        pass

    def loaded(model, **settings):
        raise Loaded(model, settings["chat_layout"], settings["system"])

    command = ["demo.py", "--model", checkpoint, "--port", "0", "--chat-layout", "u1", "--system", "Be terse."]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    monkeypatch.setattr(demo, "Answerer", loaded)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(Loaded) as seen:
        demo.main()
    assert seen.value.args == (str(checkpoint), "u1", "Be terse.")


@pytest.fixture(scope="module")
def server(checkpoint) -> Iterator[Server]:
    """Short answers, so that many can be had."""
    pytest.importorskip("gradio", reason="gradio is not installed: tools/environment.sh adds it")
    with served(checkpoint, "--max-upload-mb", str(LIMIT_MB), "--max-new-tokens", "4") as running:
        yield running


def uploads(server: Server) -> Path:
    """The directory that the server keeps uploads in."""
    return Path(server.process.environ().get("TMPDIR", "/tmp"), Path(Visitor(server, "x").upload("a", b"a")).parts[2])


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),  # a file that was opened in the browser
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Host": "elsewhere.example"}, 400),
        ({"Host": "127.0.0.1.elsewhere.example"}, 400),
        ({"Origin": "{address}"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_other_sites_cannot_use_the_server(server, headers, code):
    """Headers that their scripts, forms and images can send; the last are the page's own and a command line's."""
    headers = {name: value.format(address=server.address) for name, value in headers.items()}
    before = set(uploads(server).iterdir())
    job = {"fn_index": 1, "session_hash": "other", "data": ["Hello?", None, 1]}
    answers = [
        requests.post(f"{server.address}/gradio_api/upload", files={"files": ("x", b"xyz")}, headers=headers),
        requests.post(f"{server.address}/gradio_api/queue/join", json=job, headers=headers),
        requests.get(f"{server.address}/config", headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [code] * 3
    assert not any("access-control-allow-origin" in answer.headers for answer in answers if code != 200)
    assert (set(uploads(server).iterdir()) == before) or code == 200


def test_a_link_to_the_page_can_be_followed(server):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert requests.get(server.address, headers=headers).status_code == 200


@pytest.mark.parametrize("prefix", ["/file=", "/gradio_api/file=", "/static/", "/assets/", "/custom_component/", "/"])
@pytest.mark.parametrize(
    "path", ["{secret}", "/../../../../../../..{secret}", "..%2f..%2f..%2f..%2f..{encoded}", "%2e%2e/%2e%2e{secret}"]
)
def test_no_address_leads_to_other_files(server, tmp_path, prefix, path):
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret of this machine")
    url = server.address + prefix + path.format(secret=secret, encoded=str(secret).replace("/", "%2f"))
    with requests.Session() as session:
        request = requests.Request("GET", url).prepare()
        request.url = url  # dots stay
        answer = session.send(request, timeout=20)
    assert answer.status_code in (400, 403, 404) and "a secret of" not in answer.text


@pytest.mark.parametrize("name", ["../../../../escaped.png", "/tmp/escaped.png", "a/../../escaped.png", "x\0.png"])
def test_no_name_leads_out_of_the_uploads(server, name):
    path = Path(Visitor(server, "names").upload(name, name.encode()))
    assert path.parent.parent == uploads(server) and path.read_bytes() == name.encode()
    assert not Path("/tmp/escaped.png").exists()


def test_a_file_that_was_not_uploaded_is_not_read(server, image):
    with pytest.raises(AssertionError, match="'success': False"):
        Visitor(server, "files").look(str(image))


def test_thousands_of_uploads_leave_the_newest(tmp_path):
    """As the server calls it after each: the directory stays small, and what is used last stays."""
    from neo_megatron.demo.uploads import remove_oldest

    for number in range(2000):
        directory = tmp_path / f"{number:04d}"
        directory.mkdir()
        (directory / "a.png").write_bytes(bytes(1000))
        (directory / "b.png").write_bytes(bytes(500))
        remove_oldest(tmp_path, 20_000) if number % 50 == 49 else None
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number:04d}" for number in range(1987, 2000)]
    remove_oldest(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["1999"], "a file of any size can be looked at"


def test_ten_visitors_at_once_have_an_answer_each(server, image):
    """Each about an upload of its own, and the same as alone."""

    def visit(number: int) -> tuple[dict, dict]:
        visitor = Visitor(server, f"visitor {number}")
        path = visitor.upload(f"{number}.png", image.read_bytes() if number % 2 else other)
        return visitor.look(path), visitor.ask("What is it?")

    other = (image.parent / "d.png").read_bytes()
    alone = [visit(number) for number in (100, 101)]
    assert alone[0][1]["all"] != alone[1][1]["all"]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(visit, range(10)))
    for number, (shown, answer) in enumerate(together):
        assert shown["name"] == f"{number}.png"
        assert answer["words"] == alone[number % 2][1]["words"]


def test_an_answer_whose_visitor_has_left_does_not_hold_up_others(checkpoint):
    """It would be a million tokens long."""
    with served(checkpoint, "--max-new-tokens", "1000000") as server:
        Visitor(server, "gone").leave("Hello?")
        second = Visitor(server, "here")
        second.leave("And here?")
        Visitor(server, "third").leave("And there?")


def test_old_answers_give_up_their_heat_maps(checkpoint, image, monkeypatch):
    from neo_megatron.demo import talk

    monkeypatch.setattr(talk, "MOST_ROWS", 50_000)
    watched = talk.Talk(talk.Answerer(checkpoint, device="cpu"))
    answers = [list(watched.answers("What is it?", str(image), 0, 8))[-1] for _ in range(6)]
    assert [answer.rows.forgotten for answer in answers] == [True] * 4 + [False] * 2
    old, new = answers[0].view(), answers[-1].view()
    assert [word["text"] for word in old["words"]] == [word["text"] for word in new["words"]]
    assert "levels" in new["words"][0] and "levels" not in old["words"][0] and "ask again" in old["note"]


def memory_grows(server: Server, image: Path, requests_: int) -> float:
    """Megabytes, from a fifth of these requests to all of them."""
    before = 0
    for number in range(requests_):
        visitor = Visitor(server, f"memory {number}")
        visitor.look(visitor.upload(f"{number}.png", image.read_bytes()))
        assert visitor.ask("What is it?")["words"]
        if number == requests_ // 5:
            before = server.process.memory_info().rss
    return (server.process.memory_info().rss - before) / 1e6


@pytest.mark.thorough
def test_five_hundred_requests_leave_memory_as_it_is(server, image):
    assert memory_grows(server, image, 500) < 100
