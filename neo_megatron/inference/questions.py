"""Reads questions from annotation files; samples that preprocessing rejects are rejected with the same sentence."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.image import grid_of_size, header_size, image_tokens, pixel_limit
from neo_megatron.data.prepare.annotation_slices import read_slice, rejected_rest, slices
from neo_megatron.data.prepare.checked_samples import Checked, checked_samples, images_ahead
from neo_megatron.data.prepare.records import Sample, is_blank, is_unicode
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.choose import choose_schemas
from neo_megatron.data.prepare.schemas.convert import Converter
from neo_megatron.data.prepare.schemas.documents import is_document
from neo_megatron.data.prepare.stored_file import image_bytes
from neo_megatron.data.prepare.tallies import Noticed
from neo_megatron.errors import DataError, Reason, RejectedSample

Ask = Literal["every answer", "next turn"]
_RECORDS_AT_ONCE = 8192
_CHARACTERS_PER_TOKEN = 4
_NO_QUESTION = "the sample is a document, which has no question"


@dataclass(frozen=True)
class Question:
    """One turn for the model to generate, and its place in the data.

    Args:
        source, record, element: the file of a data set, the number of the record in it, the index in a list-packed
            record.
        turn: of the sample; the turns before it are the prompt.
        id: the record's ``id``.
        references: texts that count as right; empty where none are known.
        length: estimated tokens of the prompt; decides batches, not answers.
    """

    source: Source
    record: int
    element: int | None
    turn: int
    id: Any
    sample: Sample
    references: tuple[str, ...]
    length: int

    @property
    def place(self) -> tuple[str, str, int, int | None, int]:
        """The unique place of the question."""
        return self.source.name, os.path.abspath(self.source.annotations), self.record, self.element, self.turn

    @property
    def text(self) -> str:
        """The turn in front of the answer."""
        return self.sample.turns[self.turn - 1].text if self.turn else ""


@dataclass
class QuestionList:
    """The questions of annotation files in their order, and the samples left out, as in ``rejects.jsonl``.

    Evaluation data is small compared to training data, so it is held in memory, except for images.
    """

    questions: list[Question] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    noticed: Noticed = field(default_factory=Noticed)


def read_questions(sources: Sequence[Source], settings: PreprocessConfig, ask: Ask) -> QuestionList:
    """Reads all questions.

    Args:
        sources: as of preprocessing; for a share below 1 the same records are drawn.
        settings: limits of pixels where a data set has none of its own, and the seed of the draw.
        ask: "every answer": each turn that is trained on is one question, the turns before it as they are written its
            prompt; its text and its ``answers``, a list of strings, are the references. "next turn": each sample is one
            question, the turn after the user's last; it may have a ``prompt``, a string, in place of ``conversations``.

    Raises:
        DataError: a data set is named twice, or with more than all of it; its limits of pixels do not fit each other;
            there is no question at all.
    """
    sources = choose_schemas(sources, to_answer=ask == "next turn")
    files = Counter((source.name, source.annotations) for source in sources)
    for source in sources:
        if source.share > 1 or files[source.name, source.annotations] > 1:
            raise DataError(f"data set {source.name}: each question is asked once; name it once, with at most %100")
    converters = [Converter(source, settings.seed) for source in sources]
    own = [source.settings(settings) for source in sources]
    result = QuestionList()
    with tqdm(desc="reading", unit=" samples", mininterval=0.5) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # an image is either rejected with a reason or used
        for number, record, samples in _records(sources, converters, settings, ask, result):
            progress.update(_read_record(sources[number], record, samples, own[number], ask, result))
    if not result.questions:
        why = f"; the first of {len(result.rejects)} rejected: {result.rejects[0]['reason']}" if result.rejects else ""
        raise DataError(f"no question in {', '.join(source.annotations for source in sources)}{why}")
    return result


def _records(
    sources: Sequence[Source],
    converters: Sequence[Converter],
    settings: PreprocessConfig,
    ask: Ask,
    result: QuestionList,
) -> Iterator[tuple[int, int, list[Checked]]]:
    """(number of the source, number of the record in it, its samples); the end of a damaged file is a reject."""
    complete = _with_room if ask == "next turn" else _as_written
    for piece in slices(sources, _RECORDS_AT_ONCE):
        number = piece.place.source
        source, converter = sources[number], converters[number]
        records = read_slice(piece, source, settings.seed)
        checked = (
            (record, checked_samples(read, record, source, converter, settings.chat_layout, complete))
            for record, read in records
        )
        for record, samples in images_ahead(checked, source):
            yield number, record, samples
        if piece.broken:
            rest = rejected_rest(piece, source)
            result.rejects.append(rest.row(source.annotations, piece.place.first + len(piece.bounds), None))


def _read_record(
    source: Source,
    record: int,
    samples: Sequence[Checked],
    settings: PreprocessConfig,
    ask: Ask,
    result: QuestionList,
) -> int:
    """Adds the questions of a record; returns the number of its samples."""
    for element, written, sample in samples:
        try:
            if isinstance(sample, RejectedSample):
                raise sample
            of_images = _image_tokens(sample, settings)
            asked = [_next_turn(sample)] if ask == "next turn" else _answers(sample, written)
        except RejectedSample as rejected:
            result.rejects.append(rejected.row(source.annotations, record, element))
            continue
        place = {"file": source.annotations, "record": record, "element": element}
        honoured = {key: value for key, value in written.items() if ask != "next turn" or key != "prompt"}
        result.noticed.note(sample, honoured, sample.images, place)
        for turn, references in asked:
            length = of_images + sum(len(one.text) for one in sample.turns[:turn]) // _CHARACTERS_PER_TOKEN
            result.questions.append(
                Question(source, record, element, turn, written.get("id"), sample, references, length)
            )
    return len(samples)


def _as_written(written: Any) -> Any:
    return written


def _with_room(written: object) -> object:
    """The sample as written, with an empty turn after it to be generated."""
    if not isinstance(written, dict):
        return written
    turns = written.get("conversations")
    if "prompt" in written:
        if turns is not None:
            raise RejectedSample(Reason.MALFORMED, "the sample has both a 'prompt' and 'conversations'")
        turns = [{"from": "human", "value": written["prompt"]}]
    if isinstance(turns, list) and any(isinstance(turn, dict) and turn.get("from") == "document" for turn in turns):
        raise RejectedSample(Reason.NOTHING_TRAINED, _NO_QUESTION)
    if isinstance(turns, list) and turns:  # `check_sample` rejects any other
        turns = [*turns, {"from": "gpt", "value": ""}]
    return {**written, "conversations": turns}


def _next_turn(sample: Sample) -> tuple[int, tuple[str, ...]]:
    users = [number for number, turn in enumerate(sample.turns) if turn.role == "user"]
    return (users[-1] + 1 if users else len(sample.turns) - 1), ()


def _answers(sample: Sample, written: dict[str, Any]) -> list[tuple[int, tuple[str, ...]]]:
    """(turn, references) of every turn that is trained on."""
    if is_document(sample.turns):
        raise RejectedSample(Reason.NOTHING_TRAINED, _NO_QUESTION)
    found = []
    for number, turn in enumerate(sample.turns):
        if turn.trained:
            place = number - sample.first_turn
            further = _further_answers(place, written["conversations"][place])
            # An empty answer is allowed only if there are further answers.
            if is_blank(turn.text) and not further:
                raise RejectedSample(Reason.EMPTY_ANSWER, f"turn {place} is an empty answer; correct it")
            found.append((number, (turn.literal, *further)))
    return found


def _further_answers(number: int, turn: dict[str, Any]) -> list[str]:
    answers = turn.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise RejectedSample(Reason.MALFORMED, f"'answers' of turn {number} must be a list of strings")
    if not all(is_unicode(answer) for answer in answers):
        raise RejectedSample(
            Reason.MALFORMED, f"'answers' of turn {number} hold an unpaired surrogate (invalid Unicode)"
        )
    return answers


def _image_tokens(sample: Sample, settings: PreprocessConfig) -> int:
    """Image tokens of a sample, from the headers of its images; frames of videos are not counted."""
    limit = pixel_limit(settings.min_pixels, settings.max_pixels, len(sample.images), settings.shared_image_tokens)
    grids = [
        grid_of_size(*header_size(image_bytes(image), str(image)), str(image), settings.min_pixels, limit)
        for image in sample.images
    ]
    return int(image_tokens(np.array(grids, np.int64).reshape(-1, 2)).sum())
