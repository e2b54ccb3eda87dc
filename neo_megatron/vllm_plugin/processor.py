"""Images of a request -> patches and the number of their tokens, by the code that made the training data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo
from vllm.multimodal.processing.processor import PromptReplacement

from neo_megatron.data.image import IMAGE_TOKEN_SIDE
from neo_megatron.hf.image_processing_neo import MERGE_SIZE, NEOImageProcessor
from neo_megatron.hf.images_neo import pixel_limit
from neo_megatron.hf.tags_neo import IMAGE_TAG
from neo_megatron.vllm_plugin.limits import LIMITS, checked_limits, most_tokens

_TOGETHER = "images_of_prompt"  # how many images share the limit of pixels; it is part of the key of vLLM's caches


class NEOImages(ImageProcessorItems):
    """Images as they were sent: their bytes, where vLLM has them, since it decodes some to other pixels."""

    def _unwrap(self, item: Any) -> Any:
        return item.original_bytes if isinstance(item, MediaWithBytes) else item


class NEODataParser(MultiModalDataParser):
    """Takes images unchanged."""

    def _parse_image_data(self, data: Any) -> NEOImages | None:
        if data is None:
            return None
        if isinstance(data, (torch.Tensor, dict)):
            raise VLLMValidationError("an image is a tensor or a dictionary: NEO takes Pillow images and files")
        return NEOImages(list(data) if isinstance(data, (list, tuple)) else [data])


class NEOProcessingInfo(BaseProcessingInfo):
    """Answers vLLM's questions about images before it sees one."""

    def get_image_processor(self) -> NEOImageProcessor:
        """The image processor of the checkpoint, with the limits that the server was started with."""
        return NEOImageProcessor.from_pretrained(
            self.ctx.model_config.model, revision=self.ctx.model_config.revision, **self.server_limits()
        )

    def server_limits(self) -> dict[str, int]:
        """The limits of pixels of `--mm-processor-kwargs`."""
        return checked_limits(self.ctx.get_mm_config().mm_processor_kwargs or {})

    def get_data_parser(self) -> NEODataParser:
        return NEODataParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        processor = self.get_image_processor()
        return {"image": most_tokens(processor.min_pixels, processor.max_pixels)}


class NEODummyInputsBuilder(BaseDummyInputsBuilder[NEOProcessingInfo]):
    """The inputs by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_TAG * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        processor = self.info.get_image_processor()
        side = max(IMAGE_TOKEN_SIDE, math.isqrt(processor.max_pixels) // IMAGE_TOKEN_SIDE * IMAGE_TOKEN_SIDE)
        return {"image": [Image.new("RGB", (side, side))] * mm_counts.get("image", 0)}


class NEOMultiModalProcessor(BaseMultiModalProcessor[NEOProcessingInfo]):
    """Cuts images into patches and repeats `<IMG_CONTEXT>` for their tokens."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As in vLLM; several images of a prompt share the limit of pixels, so their number is one of the settings."""
        try:
            limits = checked_limits(inputs.hf_processor_mm_kwargs)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        allowed = self.info.get_image_processor().max_pixels
        for name, limit in limits.items():
            if limit > allowed:
                raise VLLMValidationError(
                    f"{name} of {limit}: the server takes {allowed} at most, as it kept memory for that"
                )
        together = {_TOGETHER: inputs.mm_data_items.get_count("image", strict=False)}
        return super().apply(replace(inputs, hf_processor_mm_kwargs={**limits, **together}), timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        processor, images = self.info.get_image_processor(), hf_data["images"]
        low, high = (hf_kwargs.get(name) or getattr(processor, name) for name in LIMITS)
        limit = pixel_limit(low, high, hf_kwargs[_TOGETHER])
        try:
            return processor(images, [1] * len(images), low, limit)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        grids = hf_inputs.get("grid_hw", torch.empty(0, 2, dtype=torch.int64))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grids.prod(dim=-1)),
            "grid_hw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        token = self.info.get_hf_config().img_context_token_id

        def tokens(number: int) -> list[int]:
            grid = out_mm_kwargs["image"][number]["grid_hw"].data
            return [token] * (int(grid.prod()) // MERGE_SIZE**2)

        return [PromptReplacement(modality="image", target=[token], replacement=tokens)]
