"""A checkpoint's configuration as vLLM reads it, and the settings of vLLM that NEO needs or cannot have."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from neo_megatron.errors import ConfigError
from neo_megatron.hf.configuration_neo import NEOChatConfig
from neo_megatron.vllm_plugin import MODE

_SCHEDULER = "neo_megatron.vllm_plugin.scheduler.scheduler"


class NEOServedConfig(NEOChatConfig):
    """The configuration with what vLLM looks for in it.

    Attributes:
        is_mm_prefix_lm: the tokens of an image see each other in both directions.
        mrope_section: that there are positions of three axes, t, h and w; the model rotates by itself, so that only
            their number matters.
    """

    is_mm_prefix_lm = True
    mrope_section = (1, 1, 1)

    # transformers 5 makes a data class, with an `__init__` from its fields, of a class that has none of its own.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class NEOServing(VerifyAndUpdateConfig):
    """Changes vLLM's settings to those that NEO needs.

    Raises:
        ConfigError: a setting with which NEO would compute something else, or that nobody has tried.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        if model_config.tokenizer_mode not in ("auto", MODE):
            raise ConfigError(
                f"--tokenizer-mode {model_config.tokenizer_mode}: NEO's prompts are tokenized in pieces, as its "
                f"training data is; leave the flag out, or pass {MODE}"
            )
        model_config.tokenizer_mode = MODE

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        scheduler, multimodal = vllm_config.scheduler_config, vllm_config.model_config.multimodal_config
        if scheduler.scheduler_cls is not None:
            raise ConfigError("--scheduler-cls: NEO has its own scheduler, which cuts no image; leave the flag out")
        if scheduler.long_prefill_token_threshold:
            raise ConfigError(
                f"--long-prefill-token-threshold {scheduler.long_prefill_token_threshold}: an image of more tokens "
                "would never be scheduled; leave the flag out"
            )
        if vllm_config.speculative_config is not None:
            raise ConfigError("--speculative-config: NEO was never run with a draft in vLLM; leave the flag out")
        if vllm_config.model_config.enable_prompt_embeds:
            raise ConfigError("--enable-prompt-embeds: NEO takes texts and images, not embeddings; leave the flag out")
        if multimodal is not None and multimodal.enable_mm_embeds:
            raise ConfigError("--enable-mm-embeds: NEO takes images, not embeddings of them; leave the flag out")
        parallel, heads = vllm_config.parallel_config, vllm_config.model_config.hf_text_config.num_key_value_heads
        if heads % parallel.tensor_parallel_size:
            raise ConfigError(
                f"--tensor-parallel-size {parallel.tensor_parallel_size}: must divide NEO's {heads} key-value heads"
            )
        scheduler.disable_chunked_mm_input = True
        scheduler.scheduler_cls = _SCHEDULER
