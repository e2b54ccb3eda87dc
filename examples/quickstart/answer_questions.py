"""Answers the test questions with an exported checkpoint, which it loads as any user of transformers would.

    python examples/quickstart/answer_questions.py --model out/neo --data out

Of --data it reads `test.json`, `registry.yaml` and, for the answers without a picture, `questions.json`; it writes
`answers.jsonl` there.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import batched
from pathlib import Path

import torch
import yaml
from PIL import Image
from questions import Question, read_questions, scores, text_only_answers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, logging

BATCH = 128
MAX_NEW_TOKENS = 12


class Answerer:
    """One process's model.

    Args:
        model: directory of the exported checkpoint.
        pictures: directory of the pictures.
    """

    def __init__(self, model: Path, pictures: Path) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(1)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        self.model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).to(self.device).eval()
        self.pictures = pictures

    def __call__(self, questions: Sequence[Question]) -> list[str]:
        """The answers, decoded greedily."""
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
            for question in questions
        ]
        prompts = self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        images = [Image.open(self.pictures / question.image) for question in questions]
        inputs = self.processor(images=images, text=prompts).to(self.device)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]


_answerer: Answerer


def _start(model: Path, pictures: Path) -> None:
    global _answerer
    _answerer = Answerer(model, pictures)


def _answer(questions: Sequence[Question]) -> list[str]:
    return _answerer(questions)


def answer_all(questions: Sequence[Question], model: Path, pictures: Path) -> list[str]:
    """The answers in the order of the questions; on a CPU every core works on its own batches."""
    processes = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    # Questions of one length need no padding.
    order = sorted(range(len(questions)), key=lambda number: len(questions[number].text))
    batches = list(batched((questions[number] for number in order), BATCH))
    answers = [""] * len(questions)
    places = iter(order)
    with (
        multiprocessing.get_context("spawn").Pool(processes, _start, (model, pictures)) as pool,
        tqdm(total=len(questions), unit=" questions") as progress,
    ):
        for batch in pool.imap(_answer, batches):
            for answer in batch:
                answers[next(places)] = answer
            progress.update(len(batch))
    return answers


def print_scores(questions: Sequence[Question], answers: Sequence[str], text_only: Sequence[str]) -> None:
    print(f"\n{'':20} questions   this model   best without the picture")
    for score in scores(questions, answers, text_only):
        right, guessed = score.right / score.total, score.text_only / score.total
        print(f"{score.kind:20} {score.total:9}   {right:10.1%}   {guessed:24.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="exported checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="what prepare_data.py wrote")
    arguments = parser.parse_args()
    questions = read_questions(arguments.data / "test.json")
    registry = yaml.safe_load((arguments.data / "registry.yaml").read_text())
    print(f"loading {arguments.model}", flush=True)
    # Once before the processes start: transformers copies the checkpoint's code, which they must not do at once.
    pictures = Path(registry["test"]["data_path"])
    Answerer(arguments.model, pictures)
    print("starting a process for each core", flush=True)
    answers = answer_all(questions, arguments.model, pictures)
    text_only = text_only_answers(read_questions(arguments.data / "questions.json"), questions)
    with (arguments.data / "answers.jsonl").open("w") as file:
        for question, answer, guess in zip(questions, answers, text_only, strict=True):
            file.write(json.dumps({**asdict(question), "given": answer, "text_only": guess}) + "\n")
    print_scores(questions, answers, text_only)


if __name__ == "__main__":
    main()
