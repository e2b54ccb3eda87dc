"""Converts easy-VQA to annotations with a registry, trains a tokenizer, and writes the model's config.json.

    python examples/quickstart/prepare_data.py --output out --pixels 16384 --vocabulary 512 --questions-per-sample 1

Writes `{shapes,questions,test}.json`, `registry.yaml`, `tokenizer/` and `model/config.json`. `shapes` are the training
questions that ask for the shape. The tokenizer is trained on training questions only.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path

import yaml
from questions import IMAGE_TAG, SHAPES, Question
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from neo_megatron.data.chat import NEO_TOKENS, add_neo_tokens
from neo_megatron.model.attention_forms import FORMS
from neo_megatron.presets import SIZES

try:
    import easy_vqa
except ModuleNotFoundError:
    sys.exit("prepare_data: the images are in the package easy-vqa: pip install 'easy-vqa==1.0'")

PAD = "<|endoftext|>"

IMAGES = {
    "shapes": easy_vqa.get_train_image_paths,
    "questions": easy_vqa.get_train_image_paths,
    "test": easy_vqa.get_test_image_paths,
}


def load_questions(split: str) -> list[Question]:
    """The questions of a split, "train" or "test", in the order of the package."""
    read = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    return [Question(f"{image}.png", text, answer) for text, answer, image in zip(*read(), strict=True)]


def conversation(image: str, turns: Sequence[tuple[str, str]]) -> dict:
    """An annotation record: an image, then questions and answers about it."""
    values = [value for turn in turns for value in turn]
    values[0] = IMAGE_TAG + values[0]
    roles = ("human", "gpt")
    return {
        "image": image,
        "conversations": [{"from": roles[number % 2], "value": value} for number, value in enumerate(values)],
    }


def question_records(questions: Sequence[Question], per_sample: int) -> Iterator[dict]:
    """Records with up to ``per_sample`` questions about one image each."""
    by_image: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for question in questions:
        by_image[question.image].append((question.text, question.answer))
    for image, turns in by_image.items():
        for part in batched(turns, per_sample):
            yield conversation(image, part)


def train_tokenizer(records: Sequence[dict], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``size`` tokens, including NEO's control tokens.

    Text is not split into words first, so that phrases of many questions become single tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(NEO_TOKENS),
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # takes a second
    )
    turns = (turn for record in records for turn in record["conversations"])
    pieces = (piece for turn in turns for piece in _pieces(turn))
    tokenizer.train_from_iterator(pieces, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=PAD)
    add_neo_tokens(fast)
    return fast


def _pieces(turn: dict) -> tuple[str, ...]:
    """The text of a turn as the data path splits it: at the image, and after the header of an answer."""
    if turn["from"] == "human":
        return tuple(f"user\n{turn['value']}".split(IMAGE_TAG.strip()))
    return ("assistant\n", turn["value"])


def write_model_config(
    output: Path, tokenizer: PreTrainedTokenizerFast, vocabulary: int, pixels: int, attention_form: str
) -> None:
    """Writes the preset `tiny` with the ids of this tokenizer and this image size, for `--neo-model` and the export."""
    sizes = SIZES["tiny"].replace(
        attention_form=attention_form,
        vocab_size=vocabulary,
        image_start_token_id=tokenizer.convert_tokens_to_ids("<img>"),
        image_context_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        min_pixels=pixels,
        max_pixels=pixels,
    )
    output.mkdir()
    (output / "config.json").write_text(json.dumps(sizes.to_hf(), indent=2))


def write_annotations(path: Path, records: Sequence[dict]) -> None:
    """Writes a JSON array with one record a line."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    print(f"{len(records)} records in {path}", flush=True)


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to write into")
    parser.add_argument("--pixels", type=int, required=True, help="area in pixels to which every image is resized")
    parser.add_argument("--vocabulary", type=int, required=True, help="tokens of the tokenizer")
    parser.add_argument("--attention-form", choices=FORMS, required=True, help="of the model, see docs/checkpoints.md")
    parser.add_argument("--questions-per-sample", type=int, required=True, help="training questions about one image")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    training = load_questions("train")
    data_sets = {
        "shapes": list(question_records([question for question in training if question.answer in SHAPES], 1)),
        "questions": list(question_records(training, arguments.questions_per_sample)),
        "test": list(question_records(load_questions("test"), 1)),
    }
    registry = {}
    for name, records in data_sets.items():
        write_annotations(arguments.output / f"{name}.json", records)
        images = Path(next(iter(IMAGES[name]().values()))).parent
        registry[name] = {"annotation_path": f"{name}.json", "data_path": str(images)}
    (arguments.output / "registry.yaml").write_text(yaml.safe_dump(registry))

    tokenizer = train_tokenizer(data_sets["questions"], arguments.vocabulary)
    tokenizer.save_pretrained(arguments.output / "tokenizer")
    form = arguments.attention_form
    write_model_config(arguments.output / "model", tokenizer, arguments.vocabulary, arguments.pixels, form)
    print(f"a tokenizer of {len(tokenizer)} tokens in {arguments.output / 'tokenizer'}")


if __name__ == "__main__":
    main()
