"""The schema of a data set: recognised from its first records, or asked for, and part of what a run is."""

import dataclasses
import json
import sys

import pytest

from neo_megatron.cli import evaluate, generate, preprocess
from neo_megatron.data.manifest import read_manifest
from neo_megatron.data.prepare.preprocess import preprocess as write_shards
from neo_megatron.data.prepare.registry import Source, data_list
from neo_megatron.data.prepare.schemas.choose import choose_schemas, schema_line
from neo_megatron.data.prepare.schemas.options import SchemaOptions, read_prompts
from neo_megatron.errors import DataError

NEO = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
CAPTION = {"image": "a.png", "caption": "A cat."}
PAGE = {"texts": ["One.", None], "images": [None, "a.png"]}
TEXT = {"text": "Some text."}


@pytest.fixture
def source_of(tmp_path):
    """A data set of these records."""

    def make(*records, **options) -> Source:
        path = tmp_path / "web.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return Source("web", str(path), schema=SchemaOptions(**options))

    return make


def chosen(source: Source) -> str:
    (found,) = choose_schemas([source])
    assert choose_schemas([found]) == [found]
    return found.schema.name


@pytest.mark.parametrize(
    ("record", "name"),
    [(NEO, "neo"), (MESSAGES, "messages"), (CAPTION, "caption"), (PAGE, "interleaved"), (TEXT, "text")],
)
def test_the_first_records_say_which_it_is(source_of, record, name):
    assert chosen(source_of(record)) == name
    assert chosen(source_of({"id": 1}, "x", [1], [record, record], *[{"other": 1}] * 20)) == name
    assert schema_line(*choose_schemas([source_of(record)]), source_of(record)) == (
        f"data set web: schema {name}, recognised from its first records"
    )


def test_only_the_first_sixteen_records_count(source_of):
    assert chosen(source_of(*[TEXT] * 16, CAPTION)) == "text"
    with pytest.raises(DataError, match=r"web.jsonl could be of the schema caption or text; choose one with --schema"):
        chosen(source_of(*[TEXT] * 15, CAPTION))


def test_all_files_of_a_data_set_have_the_schema_of_the_first(bench):
    files = [bench.annotations([record], f"{number}.json") for number, record in enumerate([TEXT, CAPTION, TEXT])]
    sources = [Source(name, str(file)) for name, file in zip(["web", "web", "docs"], files, strict=True)]
    assert [source.schema.name for source in choose_schemas(sources)] == ["text"] * 3
    assert [source.schema.name for source in choose_schemas(sources[1:])] == ["caption", "text"]


@pytest.mark.parametrize("records", [[{"a": 1}], [MESSAGES, NEO], [TEXT | NEO], [{"conversations": None} | TEXT]])
def test_what_was_read_before_is_read_as_before(source_of, records):
    assert chosen(source_of(*records)) == "neo"


def test_one_page_alone_in_a_file_is_not_taken_for_a_list_of_records(source_of):
    page = {"content": [{"type": "text", "text": "One."}, {"type": "image", "image": "a.png"}]}
    assert chosen(source_of(page)) == "interleaved"


def test_a_record_with_a_prompt_to_be_answered_is_read_as_before(source_of):
    source = source_of(CAPTION | {"prompt": "What is it?"})
    assert chosen(source) == "caption"
    assert choose_schemas([source], to_answer=True)[0].schema.name == "neo"


def test_a_record_of_two_forms_needs_a_choice(source_of):
    with pytest.raises(DataError, match="could be of the schema messages or text; choose one with --schema"):
        chosen(source_of(MESSAGES | TEXT))
    assert chosen(source_of(MESSAGES | TEXT, name="messages")) == "messages"


def test_the_sentence_for_an_unknown_form_names_the_schemas(bench):
    bench.preprocess([{"question": "Hi"}])
    (reject,) = bench.rejects()
    assert (
        "its keys are 'question': write its turns under 'conversations', or name its form with --schema messages,"
        in (reject["reason"])
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "llava"}, "the schema llava is not known; choose one of neo, messages, caption, interleaved, text"),
        ({"columns": (("text", "a"),)}, "columns go with a schema of your choice"),
        ({"name": "text", "columns": (("image", "a"),)}, "columns name 'image', which the schema text does not have"),
        ({"name": "caption", "image_placeholder": "[IMG]"}, "the schema caption takes text as it is"),
        ({"image_placeholder": "[IMG]"}, "the schema text takes text as it is"),
        ({"prompts": ("a",)}, "--caption-prompts goes with the schema caption, but web has the schema text"),
    ],
)
def test_options_that_do_not_fit_are_rejected(source_of, options, sentence):
    with pytest.raises(DataError, match=sentence):
        choose_schemas([source_of(TEXT, **options)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_document_tokens": 1}, "--max-document-tokens must be from 2 to 16777216, not 1"),
        ({"max_document_tokens": 1 << 25}, "--max-document-tokens must be from 2 to 16777216"),
        ({"image_placeholder": "x" * 1001}, "has more than 1000 characters"),
        ({"image_placeholder": "<image>"}, "has a tag of this project"),
        ({"columns": (("text", "a"), ("text", "b"))}, "names a field twice"),
        ({"transform": "a:b", "name": "text"}, "leave out --schema"),
    ],
)
def test_options_that_cannot_be_used_are_rejected(options, sentence):
    with pytest.raises(DataError, match=sentence):
        SchemaOptions(**options)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\n \n", "has no prompts"),
        (b"Describe.\n<image> What?\n", "line 2: the image stands in front of the prompt"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"a" * ((1 << 24) + 1), "has more than 16 MiB"),
    ],
)
def test_prompts_are_checked(tmp_path, content, sentence):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_prompts(path)
    path.write_bytes(b"\xef\xbb\xbfDescribe.\r\n\n What? \n")
    assert read_prompts(path) == ("Describe.", "What?")


REGISTRY = """
web:
  annotation_path: web.jsonl
  data_path: images
  schema: caption
  columns: {text: alt}
docs:
  annotation_path: docs.json
  image_placeholder: "[IMG]"
"""


def test_a_registry_has_the_options_of_each_data_set(bench):
    bench.images("a.png")
    bench.annotations([{"image": "a.png", "alt": "A cat."}], "web.jsonl")
    bench.annotations([NEO], "docs.json")
    registry = bench.path / "registry.yaml"
    registry.write_text(REGISTRY)
    web, docs = data_list(["web", "docs"], registry)
    assert web.schema == SchemaOptions("caption", (("text", "alt"),))
    assert docs.schema == SchemaOptions(image_placeholder="[IMG]")
    for keys, sentence in (
        ("schema: [a]", "must be strings"),
        ("columns: [a]", "columns must map"),
        ("columns: {text: 1}", "columns must map"),
        ("transform: 1", "must be strings"),
        ("transform: a:b\n  schema: text", "data set web in .*leave out --schema"),
        ("prompts: a", "correct its keys"),
    ):
        registry.write_text(f"web:\n  annotation_path: web.jsonl\n  {keys}\n")
        with pytest.raises(DataError, match=sentence):
            data_list(["web"], registry)


def test_the_manifest_has_the_schema_and_the_published_form_leaves_no_trace(bench):
    bench.images("a.png")
    rows = {"neo": NEO, "messages": MESSAGES, "caption": CAPTION}
    sources = [
        Source(name, str(bench.annotations([row], f"{name}.json")), str(bench.path / "images"))
        for name, row in rows.items()
    ]
    sources[2] = dataclasses.replace(sources[2], schema=SchemaOptions(prompts=("What?",)))
    write_shards(sources, bench.tokenizer, bench.path / "shards", bench.settings)
    neo, messages, caption = read_manifest(bench.path / "shards", "neo-shards", 3)["sources"]
    assert list(neo) == ["name", "annotations", "image_root", "share", "follow_links"]
    assert list(messages)[5:] == ["schema", "max_document_tokens"] and messages["schema"] == "messages"
    assert list(caption)[5:] == ["schema", "caption_prompts_sha256", "max_document_tokens"]


def run(monkeypatch, module, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["neo-megatron", *map(str, flags)])
    module.main()


def test_the_command_prints_the_schema_and_another_one_is_another_run(bench, monkeypatch, capsys):
    bench.images("a.png")
    file = bench.annotations([{"image": "a.png", "caption": "A cat.", "alt": "cat"}])
    prompts = bench.path / "prompts.txt"
    prompts.write_text("What is it?\nDescribe it.\n")
    common = ["--input", file, "--image-root", bench.path / "images", "--tokenizer", bench.tokenizer, "--workers", 1]
    common += ["--output", bench.path / "shards", "--min-pixels", 1024, "--max-pixels", 65536]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("neo_megatron.data.prepare.preprocess._join_outcomes", killed)
        run(monkeypatch, preprocess, *common, "--caption-prompts", prompts)
    assert "data set train: schema caption, recognised from its first records" in capsys.readouterr().out
    with pytest.raises(DataError, match="unfinished run with another .*--schema, --columns"):
        run(monkeypatch, preprocess, *common, "--schema", "caption", "--columns", "text=alt")
    assert "data set train: schema caption\n" in capsys.readouterr().out
    run(monkeypatch, preprocess, *common, "--schema", "caption", "--caption-prompts", prompts)
    assert "kept 1 samples: 1 with images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "flags", "sentence"),
    [
        (preprocess, ["--registry", "r", "--datasets", "a", "--schema", "text"], "--schema goes with --input"),
        (
            evaluate,
            ["--registry", "r", "--datasets", "a", "--image-placeholder", "x"],
            "--image-placeholder goes with --input; a registry has image_placeholder",
        ),
        (preprocess, ["--input", "a", "--columns", "text"], "text must have the form OURS=THEIRS"),
        (generate, ["--prompt", "a", "--caption-prompts", "f"], "--caption-prompts goes with --input"),
    ],
)
def test_flags_that_do_not_go_together_are_usage_errors(monkeypatch, capsys, module, flags, sentence):
    needed = {preprocess: ["--tokenizer", "t", "--output", "o"], evaluate: ["--model", "m", "--output", "o"]}
    with pytest.raises(SystemExit):
        run(monkeypatch, module, *needed.get(module, ["--model", "m"]), *flags)
    assert sentence in capsys.readouterr().err
