"""vLLM's schedulers, which compute an image's tokens in one step, also where prefix caching has some of them."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from neo_megatron.vllm_plugin.spans import begins_in_an_image_that_is_cut


class UncutImages:
    """Waits for a step with room for the rest of an image.

    `--disable-chunked-mm-input` makes vLLM end a step in front of an image that would be cut. An image with which the
    step begins it would still cut, and its first tokens may also come from the prefix cache.
    """

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        images = [
            (feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length - 1)
            for feature in request.mm_features or ()
        ]
        if begins_in_an_image_that_is_cut(num_computed_tokens, num_computed_tokens + num_new_tokens, images):
            return [], 0, encoder_compute_budget, [], []
        return super()._try_schedule_encoder_inputs(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens
        )


class NEOScheduler(UncutImages, Scheduler):
    """For an engine that runs a step after the other."""


class NEOAsyncScheduler(UncutImages, AsyncScheduler):
    """For an engine that prepares a step while the one before it runs."""


def scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler of an engine: of which kind, vLLM decides after it has asked for the settings that NEO needs."""
    kind = NEOAsyncScheduler if vllm_config.scheduler_config.async_scheduling else NEOScheduler
    return kind(vllm_config, *args, **kwargs)
