"""Processor: text with `<image>` tags, and images -> model inputs, cut and tokenized as the training data is.

Some versions of transformers (4.57, 5.8) copy the files that this one imports and not what those import, so all of
them are named here.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import torch
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .errors_neo import RejectedSample  # noqa: F401 - for image_processing_neo
from .image_limits_neo import check_bytes  # noqa: F401 - for image_processing_neo
from .image_processing_neo import MERGE_SIZE, ImageInput, NEOImageProcessor, check_tensors, row_major
from .images_neo import decode  # noqa: F401 - for image_processing_neo
from .messages_neo import as_conversations, checked_messages, images_of, template_has_variable
from .rows_neo import EncodedText, PromptEncoder, padded_rows
from .tags_neo import IMAGE_TAG

__all__ = ["NEOImageProcessor", "NEOProcessor", "row_major"]

# Default as in transformers 5: lists, unless padding is requested.
UNSET = "auto"
# Groups of a processor's arguments in transformers.
_GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")
# These arguments imply rows of one length.
_OF_ROWS = {"padding", "padding_side", "pad_to_multiple_of", "return_tensors"}


class NEOProcessor(ProcessorMixin):
    """Tokenizer and image processor in one; `apply_chat_template` takes conversations with images.

    Attributes:
        image_token, image_token_id: what stands in ``input_ids`` for each 32x32 pixels of an image. In a text an image
            is an `<image>` tag.
    """

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    image_token = "<IMG_CONTEXT>"
    # Saved with its code, so that it loads alone.
    _auto_class = "AutoProcessor"

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "NEOProcessor":
        """Loads both parts directly: the AutoImageProcessor of transformers 5 needs torchvision, NEO does not.

        Args:
            min_pixels, max_pixels, image_grid_thw: of the image processor, in place of the checkpoint's.
        """
        of_images = {key: kwargs.pop(key) for key in ("min_pixels", "max_pixels", "image_grid_thw") if key in kwargs}
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        image_processor = NEOImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs, **of_images)
        return cls(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; what is saved loads without this package, and the image processor in it alone."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        self.image_processor.save_pretrained(save_directory)
        return saved

    @property
    def image_grid_thw(self) -> bool:
        """Whether grids have the form of Qwen-VL's processors; see `NEOImageProcessor`."""
        return self.image_processor.image_grid_thw

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", self.image_processor.grid_key]

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = UNSET,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        load_audio_from_video: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, for one conversation or several; contents are lists of parts or plain strings.

        A part is ``{"type": "text", "text": ...}`` or ``{"type": "image", "image": ...}``, its image given in any
        form of `ImageInput`, or under the key "url", "path" or "base64", or as OpenAI's "image_url". A tag in the text
        of a user or a system message is the place of an image, too, unless a backslash stands in front of it; in a
        message of the assistant it is text, and is escaped if a string is requested.

        Args:
            tokenize: whether to call the processor with what the template made of the conversation; control tokens in
                a content are then tokenized as the text they are, with or without ``sanitize_control_tokens``.
            return_tensors, padding: as in a call. Without either, rows are lists without padding.
            return_assistant_tokens_mask: also ``assistant_masks``, 1 on the tokens that training would train on.
            load_audio_from_video: `transformers serve` passes False to every processor; NEO takes no sound.
            processor_kwargs, kwargs: of a call; ``images`` there are for parts without one. Further
                variables of the template.

        Raises:
            ValueError: a message that NEO cannot take; tools or documents, for which NEO's template has no place; the
                sound of a video.
            TypeError: an argument that neither the processor nor the template knows.
        """
        if load_audio_from_video:
            raise ValueError("load_audio_from_video: NEO takes images and text, so leave it False")
        template = self._template(chat_template)
        known = self._arguments() - {"text"}
        variables = {
            name: value for name, value in kwargs.items() if name not in known and template_has_variable(template, name)
        }
        call = {name: value for name, value in kwargs.items() if name not in variables} | dict(processor_kwargs or {})
        chats, several = as_conversations(conversation)
        chats = [checked_messages(chat, template) for chat in chats]
        _check_known(call, known)
        call = _ungrouped(call)
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ValueError(
                "continue_final_message continues the last message: leave out add_generation_prompt and "
                "return_assistant_tokens_mask"
            )
        encoder = PromptEncoder(self.tokenizer)
        if tokenize:
            for part in (part for chat in chats for message in chat for part in message["content"] if "text" in part):
                part["text"] = encoder.mark_typed(part["text"])
        elif sanitize_control_tokens:
            raise ValueError("sanitize_control_tokens needs tokenize=True")
        try:
            prompts, answers = render_jinja_template(
                conversations=chats,
                tools=tools,
                documents=documents,
                chat_template=template,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                continue_final_message=continue_final_message,
                add_generation_prompt=add_generation_prompt,
                **{**self.tokenizer.special_tokens_map, **variables},
            )
        except jinja2.TemplateError as error:
            raise ValueError(str(error)) from error
        if not tokenize:
            return prompts if several else prompts[0]
        if return_tensors != UNSET:
            call["return_tensors"] = return_tensors
        elif not call.keys() & _OF_ROWS:
            call |= {"padding": False, "return_tensors": None}
        images = [images_of(chat) for chat in chats]
        if call.get("images") is None:
            call["images"] = images
        elif any(images):
            raise ValueError("images are given with the messages and as an argument: leave one of them out")
        if return_assistant_tokens_mask:
            call["answers"] = answers
        features = self._features(text=prompts, **call)
        return features if return_dict else features["input_ids"]

    def __call__(
        self,
        images: ImageInput | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tensors for `forward` and `generate`.

        Args:
            images: in the order of the tags of all texts, or a list for each text.
            text: one or several prompts, every image's place marked by `<image>`. A tag after a backslash is text, and
                so is any in the turn of an assistant.
            videos, audio: transformers passes them to every processor; not for NEO.
            padding: True (the default) or "longest", "max_length", or False, which needs ``return_tensors=None`` where
                rows differ in length.
            padding_side: "left", as generation needs it, or "right".
            truncation, max_length, pad_to_multiple_of, return_attention_mask, add_special_tokens: as for a tokenizer.
            return_tensors: "pt" (the default), or ``None`` for lists; rows are then padded only on demand, and so are
                those of texts without images by default, as a tokenizer returns them.
            return_mm_token_type_ids: also ``mm_token_type_ids``, 1 on the tokens of images.
            min_pixels, max_pixels: limits of a resized image in place of the image processor's.
            text_kwargs, images_kwargs, common_kwargs: dictionaries of the above.

        Raises:
            ValueError: tags and images differ in number, by text where images are nested; a video or a sound; another
                kind of tensor is asked for; an image would be cut off.
            TypeError: an argument that is not known.
        """
        if videos is not None or audio is not None:
            raise ValueError("NEO takes images and text: give the frames of a video as images")
        _check_known(kwargs, self._arguments())
        kwargs = _ungrouped(kwargs)
        if images is None and not isinstance(text, str) and not kwargs.keys() & _OF_ROWS:
            kwargs |= {"padding": False, "return_tensors": None}
        return self._features(images, text, **kwargs)

    def _features(
        self,
        images: Any,
        text: Any,
        videos: None = None,
        audio: None = None,
        padding: bool | str | None = None,
        padding_side: str = "left",
        truncation: bool | str | None = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = "pt",
        return_attention_mask: bool | None = True,
        return_mm_token_type_ids: bool = False,
        add_special_tokens: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        answers: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> BatchFeature:
        """As `__call__`; ``answers`` are the spans of each text, in characters, that the mask marks."""
        check_tensors(return_tensors)
        if add_special_tokens and self.tokenizer.num_special_tokens_to_add():
            raise ValueError("add_special_tokens: the template places all of NEO's, so leave it False")
        texts = [text] if isinstance(text, str) else list(text or [])
        if not all(isinstance(one, str) for one in texts):
            raise ValueError("text must be a string or a list of strings")
        encoder = PromptEncoder(self.tokenizer)
        layouts = [encoder.lay_out(one, spans) for one, spans in zip(texts, answers or [()] * len(texts), strict=True)]
        counts = [layout.images for layout in layouts]
        ordered = _in_order(images, counts)
        features: dict[str, Any] = {}
        sizes: list[int] = []
        if ordered:
            features = self.image_processor(ordered, counts, min_pixels, max_pixels, return_tensors)
            grids = features[self.image_processor.grid_key]
            sizes = [int(height) * int(width) // MERGE_SIZE**2 for *_, height, width in grids]
        rows = encoder.encode(layouts, sizes)
        rows = [self._cut(row, truncation, max_length, f"text {number}") for number, row in enumerate(rows, start=1)]
        if padding is None:
            padding = return_tensors is not None
        tokens = padded_rows(
            {
                "input_ids": [row.ids for row in rows],
                "attention_mask": [[1] * len(row.ids) for row in rows],
                "assistant_masks": [row.in_answer for row in rows],
                "mm_token_type_ids": [[int(token == self.image_token_id) for token in row.ids] for row in rows],
            },
            {"input_ids": self.tokenizer.pad_token_id},
            padding,
            padding_side,
            self._limit(max_length),
            pad_to_multiple_of,
        )
        if return_attention_mask is False:
            del tokens["attention_mask"]
        if answers is None:
            del tokens["assistant_masks"]
        if not return_mm_token_type_ids:
            del tokens["mm_token_type_ids"]
        if return_tensors is None:
            return BatchFeature({**tokens, **features})
        if len({len(row) for row in tokens["input_ids"]}) > 1:
            raise ValueError("the texts differ in length: pass padding=True, or return_tensors=None for lists")
        return BatchFeature({**{key: torch.tensor(value) for key, value in tokens.items()}, **features})

    def _template(self, chat_template: str | None) -> str:
        known = self.chat_template
        if isinstance(known, dict):
            chat_template = known.get(chat_template or "default", chat_template)
        template = chat_template or (known if isinstance(known, str) else None)
        if template is None:
            raise ValueError("the processor has no chat template: pass chat_template, or load it from a checkpoint")
        return template

    def _arguments(self) -> set[str]:
        return inspect.signature(self._features).parameters.keys() - {"answers"} | set(_GROUPS)

    def _limit(self, max_length: int | None) -> int:
        return self.tokenizer.model_max_length if max_length is None else max_length

    def _cut(self, row: EncodedText, truncation: bool | str | None, max_length: int | None, name: str) -> EncodedText:
        """The tokens of a text that ``max_length`` leaves.

        Raises:
            ValueError: an image would be cut off.
        """
        if truncation in (None, False, "do_not_truncate") or len(row.ids) <= self._limit(max_length):
            return row
        if truncation not in (True, "longest_first", "only_first"):
            raise ValueError(f"truncation={truncation!r}: say True or False")
        limit = self._limit(max_length)
        cut = slice(len(row.ids) - limit, None) if self.tokenizer.truncation_side == "left" else slice(limit)
        kept = EncodedText(row.ids[cut], row.in_answer[cut])
        if kept.ids.count(self.image_token_id) < row.ids.count(self.image_token_id):
            raise ValueError(
                f"{name} has {len(row.ids)} tokens, and max_length={limit} would cut off tokens of its images: raise "
                "max_length, or lower max_pixels"
            )
        return kept


def _check_known(arguments: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(arguments.keys() - known):
        raise TypeError(
            f"NEO's processor does not know the argument {unknown[0]!r}; it knows {', '.join(sorted(known))}"
        )


def _ungrouped(arguments: Mapping[str, Any]) -> dict[str, Any]:
    grouped = {name: value for group in _GROUPS for name, value in (arguments.get(group) or {}).items()}
    return {**{name: value for name, value in arguments.items() if name not in _GROUPS}, **grouped}


def _in_order(images: Any, tags: Sequence[int]) -> list[ImageInput]:
    """The images of all texts in the order of their tags.

    Args:
        images: flat, or nested with a list (or ``None``) for each text.
        tags: how many each text has.

    Raises:
        ValueError: images and tags differ in number, naming the text if it is known.
    """
    flat = [] if images is None else [images] if isinstance(images, ImageInput) else list(images)
    nested = [image is None or isinstance(image, (list, tuple)) for image in flat]
    if not any(nested):
        if sum(tags) != len(flat):
            raise ValueError(
                f"{len(flat)} images for {sum(tags)} {IMAGE_TAG} tags: give one image for each tag; a tag that is "
                f"meant as text is written \\{IMAGE_TAG}"
            )
        return flat
    if not all(nested):
        raise ValueError("images mixes lists with images: give a list for each text, or one list of images")
    if len(flat) != len(tags):
        raise ValueError(f"images has {len(flat)} lists for {len(tags)} texts: give a list for each text")
    for number, (of_text, count) in enumerate(zip(flat, tags, strict=True), start=1):
        if len(of_text or ()) != count:
            raise ValueError(
                f"{len(of_text or ())} images for {count} {IMAGE_TAG} tags in text {number}: give one image for "
                f"each tag; a tag that is meant as text is written \\{IMAGE_TAG}"
            )
    return [image for of_text in flat for image in of_text or ()]
