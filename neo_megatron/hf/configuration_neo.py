"""Configuration of a NEO checkpoint in transformers: the published `config.json` with `model_type: neo_chat`."""

from typing import Any

from transformers import PretrainedConfig
from transformers.utils import logging

from .kinds_neo import refuse_generation, refuse_other_kinds
from .serving_neo import register_with_server

logger = logging.get_logger(__name__)


def _scalar(value: Any) -> Any:
    """Released configurations wrap some numbers in one-element lists."""
    return value[0] if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], str) else value


class NEOVisionConfig(PretrainedConfig):
    """Sizes of the patch embedding; `hidden_size` is its own width, `llm_hidden_size` the decoder's."""

    model_type = "neo_vision"

    def __init__(
        self,
        patch_size: int = 16,
        hidden_size: int = 1024,
        llm_hidden_size: int = 2048,
        downsample_ratio: float = 0.5,
        rope_theta_vision: float = 10000.0,
        max_position_embeddings_vision: int = 10000,
        num_channels: int = 3,
        min_pixels: int = 65536,
        max_pixels: int = 4194304,
        **kwargs: Any,
    ) -> None:
        self.patch_size = _scalar(patch_size)
        self.hidden_size = _scalar(hidden_size)
        self.llm_hidden_size = _scalar(llm_hidden_size)
        self.downsample_ratio = _scalar(downsample_ratio)
        self.rope_theta_vision = _scalar(rope_theta_vision)
        self.max_position_embeddings_vision = _scalar(max_position_embeddings_vision)
        self.num_channels = _scalar(num_channels)
        self.min_pixels = _scalar(min_pixels)
        self.max_pixels = _scalar(max_pixels)
        super().__init__(**kwargs)


class NEOLLMConfig(PretrainedConfig):
    """Sizes of the decoder: Qwen3's keys, `rope_theta_hw` and the number of pre-buffer layers in front.

    `attention_form` says where the channels for rows and columns are: `separate`, next to Qwen3's, or `in-head`. With
    `num_experts` every layer has experts in place of its SwiGLU, as in a Qwen3-MoE.

    `num_hidden_layers` counts all layers, the `extra_num_layers` of the pre-buffer among them; ``None`` if the
    checkpoint does not say how many those are, which matters only for training.
    """

    model_type = "qwen3"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2048,
        intermediate_size: int = 6144,
        num_hidden_layers: int = 40,
        extra_num_layers: int | None = None,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        rope_theta_hw: float = 10000.0,
        max_position_embeddings: int = 40960,
        max_position_embeddings_hw: int = 10000,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        attention_form: str = "separate",
        num_experts: int | None = None,
        num_experts_per_tok: int | None = None,
        moe_intermediate_size: int | None = None,
        norm_topk_prob: bool = False,
        **kwargs: Any,
    ) -> None:
        if (num_experts or kwargs.get("num_local_experts")) and (
            kwargs.get("decoder_sparse_step", 1) != 1 or kwargs.get("mlp_only_layers")
        ):
            raise ValueError("decoder_sparse_step or mlp_only_layers in llm_config: every layer of NEO has experts")
        if attention_form not in ("separate", "in-head"):
            raise ValueError(f"attention_form {attention_form!r} in llm_config: NEO has 'separate' and 'in-head'")
        if hidden_act != "silu":
            raise ValueError(f"hidden_act {hidden_act!r} in llm_config: NEO is defined with 'silu'")
        if kwargs.pop("use_sliding_window", False):
            raise ValueError("use_sliding_window in llm_config: NEO attends to all tokens, set it to false")
        kwargs.pop("sliding_window", None)  # unused, but a cache made from this configuration would use it
        self.vocab_size = _scalar(vocab_size)
        self.hidden_size = _scalar(hidden_size)
        self.intermediate_size = _scalar(intermediate_size)
        self.num_hidden_layers = _scalar(num_hidden_layers)
        self.extra_num_layers = _scalar(extra_num_layers)
        self.num_attention_heads = _scalar(num_attention_heads)
        self.num_key_value_heads = _scalar(num_key_value_heads)
        self.head_dim = _scalar(head_dim)
        self.hidden_act = hidden_act
        self.rms_norm_eps = _scalar(rms_norm_eps)
        # transformers 5 puts Qwen3's rotary base into a dictionary.
        in_dictionary = (kwargs.pop("rope_parameters", None) or {}).get("rope_theta", 1e6)
        self.rope_theta = float(_scalar(in_dictionary if rope_theta is None else rope_theta))
        self.rope_theta_hw = float(_scalar(rope_theta_hw))
        self.max_position_embeddings = _scalar(max_position_embeddings)
        self.max_position_embeddings_hw = _scalar(max_position_embeddings_hw)
        self.attention_form = attention_form
        # Of a mixture of experts, under Qwen3-MoE's names and with its defaults.
        self.num_experts = num_experts or kwargs.pop("num_local_experts", None) or 0  # its name since transformers 5
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs.pop("layer_types", None)  # every layer has full attention, so the list adds nothing
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class NEOChatConfig(PretrainedConfig):
    """The model: `llm_config`, `vision_config` and the ids of the image tokens.

    A NEO under another name, such as a published checkpoint, is recognised, with a warning.
    `image_token_id`, the name in other models, is an alias of `img_context_token_id`.

    Raises:
        ValueError: a configuration of another model, of a quantised or NEO-unify checkpoint or with another template;
            an activation that NEO does not have.
    """

    model_type = "neo_chat"
    sub_configs = {"vision_config": NEOVisionConfig, "llm_config": NEOLLMConfig}
    attribute_map = {"image_token_id": "img_context_token_id"}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vision_config: dict[str, Any] | NEOVisionConfig | None = None,
        llm_config: dict[str, Any] | NEOLLMConfig | None = None,
        downsample_ratio: float = 0.5,
        template: str = "neo1_0",
        img_start_token_id: int = 151670,
        img_context_token_id: int = 151669,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_generation(kwargs)
        refuse_other_kinds({**kwargs, "llm_config": llm_config, "template": template})
        if isinstance(vision_config, NEOVisionConfig):
            vision_config = vision_config.to_dict()
        if isinstance(llm_config, NEOLLMConfig):
            llm_config = llm_config.to_dict()
        name = kwargs.pop("model_type", self.model_type)
        if name != self.model_type:
            self._rename(name, vision_config or {}, kwargs)
        if tie_word_embeddings is None:
            tie_word_embeddings = _scalar((llm_config or {}).get("tie_word_embeddings", False))
        self.vision_config = NEOVisionConfig(**(vision_config or {}))
        # Stored once: versions of transformers read it from either configuration.
        self.llm_config = NEOLLMConfig(**{**(llm_config or {}), "tie_word_embeddings": tie_word_embeddings})
        self.downsample_ratio = _scalar(downsample_ratio)
        self.template = template
        self.img_start_token_id = _scalar(img_start_token_id)
        self.img_context_token_id = _scalar(img_context_token_id)
        kwargs.pop("hidden_size", None)  # kept in llm_config
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def hidden_size(self) -> int:
        return self.llm_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.llm_config.vocab_size

    def get_text_config(self, *args: Any, **kwargs: Any) -> NEOLLMConfig:
        """The decoder's configuration, from which generation takes the number of layers and heads."""
        return self.llm_config

    @classmethod
    def _rename(cls, name: str, vision_config: dict[str, Any], others: dict[str, Any]) -> None:
        if "llm_hidden_size" not in vision_config:
            raise ValueError(f"a config.json of the model_type {name!r} without llm_hidden_size: give that of a NEO")
        others.pop("auto_map", None)  # it refers to the other model's code
        others["architectures"] = ["NEOChatModel"]
        logger.warning(f"config.json calls this NEO {name!r}: read as {cls.model_type!r}, its auto_map is not used")


register_with_server(NEOChatConfig.model_type, "NEOChatModel")
