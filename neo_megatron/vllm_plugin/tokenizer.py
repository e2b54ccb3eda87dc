"""Prompts to token ids as the training data was tokenized, with one `<IMG_CONTEXT>` in place of each image."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import BatchEncoding
from transformers.utils.chat_template_utils import render_jinja_template
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams
from vllm.tokenizers.hf import CachedHfTokenizer

from neo_megatron.hf.messages_neo import checked_messages, images_of, template_has_variable
from neo_megatron.hf.rows_neo import EncodedText, Layout, PromptEncoder
from neo_megatron.hf.tags_neo import IMAGE_TAG

# What vLLM passes on to every template; its server always adds the last one.
_TEMPLATE_SETTINGS = {
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "tokenize",
    "tools",
    "cohere_format",
}


class NEOTokenizer:
    """Loads a checkpoint's tokenizer; vLLM asks for the class by `--tokenizer-mode`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer of transformers, whose strings are prompts: control tokens and `<image>` tags are read."""
        return in_pieces(CachedHfTokenizer.from_pretrained(*args, **kwargs))


def in_pieces(tokenizer: Any) -> Any:
    """A copy of a fast tokenizer that cuts prompts where the training data is cut.

    vLLM copies tokenizers for its threads, so that the copy has to know how to be made again.
    """
    plain, made = tokenizer, copy.copy(tokenizer)

    class PieceTokenizer(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
            if kwargs.get("split_special_tokens"):  # a piece, from PromptEncoder
                return super().__call__(text, *args, **kwargs)
            if kwargs.get("return_offsets_mapping"):
                raise ValueError("NEO's prompts are tokenized in pieces, which have no offsets: do not ask for them")
            texts = [text] if isinstance(text, str) else list(text)
            encoder = PromptEncoder(self)
            rows = [_encoded(encoder, encoder.lay_out(one)).ids for one in texts]
            if kwargs.get("truncation") and (limit := kwargs.get("max_length")) is not None:
                kept = slice(-limit, None) if self.truncation_side == "left" else slice(limit)
                rows = [row[kept] if len(row) > limit else row for row in rows]
            return BatchEncoding({"input_ids": rows[0] if isinstance(text, str) else rows})

        def encode(self, text: str, *args: Any, **kwargs: Any) -> list[int]:
            return self(text, **kwargs)["input_ids"]

        def apply_chat_template(
            self,
            conversation: Sequence[Mapping[str, Any]],
            tools: Any = None,
            documents: Any = None,
            chat_template: str | None = None,
            add_generation_prompt: bool = False,
            continue_final_message: bool = False,
            tokenize: bool = True,
            return_dict: bool = False,
            **variables: Any,
        ) -> Any:
            """Token ids of a conversation as vLLM has parsed it: `{"type": "image"}` stands for each image.

            Raises:
                ValueError: as `NEOProcessor.apply_chat_template`; tags without an image.
            """
            template = chat_template or self.chat_template
            messages = checked_messages(_without_vllms_keys(conversation), template)
            parts = [part for message in messages for part in message["content"]]
            encoder = PromptEncoder(self)
            for part in parts:
                if tokenize and "text" in part:
                    part["text"] = encoder.mark_typed(part["text"])
            prompts, _ = render_jinja_template(
                conversations=[messages],
                tools=tools,
                documents=documents,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self.special_tokens_map, **variables},
            )
            if not tokenize:
                return prompts[0]
            layout, images = encoder.lay_out(prompts[0]), sum(part["type"] == "image" for part in parts)
            if layout.images != images:
                raise ValueError(
                    f"{images} images for {layout.images} {IMAGE_TAG} tags: leave out tags in texts, each image of a "
                    f"message has its place; a tag that is meant as text is written \\{IMAGE_TAG}"
                )
            ids = _encoded(encoder, layout).ids
            return BatchEncoding({"input_ids": ids}) if return_dict else ids

        def __reduce__(self) -> tuple[Any, ...]:
            return in_pieces, (plain,)

    PieceTokenizer.__name__ = type(tokenizer).__name__
    made.__class__ = PieceTokenizer
    return made


class NEORenderer(HfRenderer):
    """vLLM's renderer, which refuses what vLLM would drop, and compares the images of a prompt with their places."""

    def render_messages(self, messages: Sequence[Mapping[str, Any]], params: ChatParams) -> Any:
        return super().render_messages(*self._checked(messages, params))

    async def render_messages_async(self, messages: Sequence[Mapping[str, Any]], params: ChatParams) -> Any:
        return await super().render_messages_async(*self._checked(messages, params))

    def _checked(
        self, messages: Sequence[Mapping[str, Any]], params: ChatParams
    ) -> tuple[list[dict[str, Any]], ChatParams]:
        """Messages and settings of a request, to be rendered to token ids.

        Raises:
            VLLMValidationError: a message, a part or a variable of the template that NEO does not know; a local file
                that the server does not allow.
        """
        template = params.chat_template or self.get_tokenizer().chat_template
        # Of a request, contents are iterators that can be read once.
        read = [
            {
                key: value if key != "content" or isinstance(value, str) or value is None else list(value)
                for key, value in message.items()
            }
            for message in messages
        ]
        try:
            images = images_of(checked_messages(_without_vllms_types(read), template))
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        for image in images:
            if isinstance(image, str) and image.startswith("file:") and not self.model_config.allowed_local_media_path:
                raise VLLMValidationError(
                    f"the image {image:.200} is a local file: start the server with --allowed-local-media-path, or "
                    "send the image as a data URI"
                )
        for name, value in params.chat_template_kwargs.items():
            if value is not None and name not in _TEMPLATE_SETTINGS and not template_has_variable(template, name):
                raise VLLMValidationError(f"NEO's template does not know the variable {name!r}: leave it out")
        # vLLM would render a string, in which typed control tokens are no longer told from the template's.
        settings = {**params.chat_template_kwargs, "tokenize": True}
        return read, replace(params, chat_template_kwargs=settings, chat_template_content_format="openai")

    def _process_tokens(self, prompt: Any, **kwargs: Any) -> Any:
        self._check_images(prompt)
        return super()._process_tokens(prompt, **kwargs)

    async def _process_tokens_async(self, prompt: Any, **kwargs: Any) -> Any:
        self._check_images(prompt)
        return await super()._process_tokens_async(prompt, **kwargs)

    def _check_images(self, prompt: Any) -> None:
        """Raises VLLMValidationError where images and places differ, which the engine would not survive."""
        config, ids = self.model_config.hf_config, prompt["prompt_token_ids"]
        before = [None, *ids[:-1]]
        places = [
            last == config.img_start_token_id
            for last, token in zip(before, ids, strict=True)
            if token == config.img_context_token_id
        ]
        images = (prompt.get("multi_modal_data") or {}).get("image")
        given = 0 if images is None else len(images) if isinstance(images, (list, tuple)) else 1
        if not all(places):
            raise VLLMValidationError(
                "the prompt has <IMG_CONTEXT> that does not follow <img>: write one for each image, vLLM repeats it"
            )
        if len(places) != given:
            raise VLLMValidationError(
                f"{given} images for {len(places)} {IMAGE_TAG} tags: give one image for each tag; a tag that is "
                f"meant as text is written \\{IMAGE_TAG}"
            )


def _encoded(encoder: PromptEncoder, layout: Layout) -> EncodedText:
    """The ids with one token for each image."""
    return encoder.encode([layout], [1] * layout.images)[0]


def _without_vllms_types(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the image of vLLM's type `image_pil` under its usual name."""
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": part["image_pil"]}
                if isinstance(part, Mapping) and part.keys() == {"type", "image_pil"}
                else part
                for part in message["content"]
            ],
        }
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _without_vllms_keys(conversation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the keys that vLLM adds to those of a request, where they are empty."""
    return [
        {key: value for key, value in message.items() if value not in (None, [], "")}
        | {"content": message.get("content", "")}
        for message in conversation
    ]
