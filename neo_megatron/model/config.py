"""The sizes of a NEO: one description for flags, modules, converters and tests; to and from the HF `config.json`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from neo_megatron.errors import ConfigError
from neo_megatron.model.attention_forms import FORMS, AttentionForm

# Float32 logits that the head holds at once, on one tensor-parallel rank; the planner counts with it too. At 151,936
# words these are 1,766 positions, enough for an efficient matrix product.
LOGIT_BYTES = 1 << 30

# Names in --recompute-modules that are not Megatron's. Both compute elementwise, from what the backward keeps anyway:
# the output of SwiGLU from its input; queries, keys and values from the projections (norms, rotations, concatenation).
ELEMENTWISE = ("mlp_act", "qkv_heads")

# More means a broken config.json, and a table of all tensors would fill the memory.
MAX_LAYERS = 10_000
MAX_PIXELS = 1 << 27  # of a resized image: as many as are decoded
_LARGEST_COUNT = (1 << 31) - 1
_LARGEST_BASE = 1e18  # of a rotation


@dataclass(frozen=True)
class NeoSizes:
    """All sizes and constants of a NEO.

    Args:
        hidden_size: width of the decoder.
        ffn_hidden_size: width of the SwiGLU.
        num_attention_heads: query heads.
        num_query_groups: key-value heads.
        head_dim: width of a value head.
        pre_buffer_layers: decoder layers in front of the post-LLM.
        post_llm_layers: decoder layers that come from the language model.
        vocab_size: rows of the embedding and of the head.
        tie_word_embeddings: embedding and head are one parameter.
        patch_embedding_size: channels between the two projections of the patch embedding.
        rope_theta, rope_theta_hw, rope_theta_patch: rotary bases of t, of h and w, and of the patch embedding.
        min_pixels, max_pixels: limits of a resized image.
        image_start_token_id, image_context_token_id: ids of ``<img>`` and ``<IMG_CONTEXT>``.
        attention_form: a key of `attention_forms.FORMS`.
        num_experts: of every layer, in place of its SwiGLU; 0 for a dense model.
        experts_per_token: how many of them a token goes to.
        expert_ffn_hidden_size: width of an expert's SwiGLU.
        norm_topk_prob: the weights of a token's experts are divided by their sum.
    """

    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    pre_buffer_layers: int
    post_llm_layers: int
    vocab_size: int
    tie_word_embeddings: bool
    patch_embedding_size: int
    patch_size: int = 16
    merge_size: int = 2
    rope_theta: float = 1e6
    rope_theta_hw: float = 1e4
    rope_theta_patch: float = 1e4
    norm_epsilon: float = 1e-6
    max_positions: int = 40960
    max_positions_hw: int = 10000
    min_pixels: int = 65536
    max_pixels: int = 4194304
    image_start_token_id: int = 151670
    image_context_token_id: int = 151669
    attention_form: str = "separate"
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    norm_topk_prob: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_field(field.name, getattr(self, field.name))
        if not 0 < self.num_layers <= MAX_LAYERS:
            raise ConfigError(f"{self.num_layers} layers are out of range: give 1 to {MAX_LAYERS}")
        if self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}: lower it")
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_query_groups "
                f"({self.num_query_groups})"
            )
        if any(width % 2 for width in self.axis_widths):
            raise ConfigError(
                f"head_dim ({self.head_dim}) must be a multiple of {8 // self.form.query_key_widths}: h and w each "
                "rotate pairs of a quarter of a query's channels"
            )
        if self.num_experts:
            if not 0 < self.experts_per_token <= self.num_experts:
                raise ConfigError(f"experts_per_token is {self.experts_per_token}: it must be 1 to {self.num_experts}")
            if not self.expert_ffn_hidden_size:
                raise ConfigError("expert_ffn_hidden_size is 0: give the width of an expert")
        elif self.experts_per_token or self.expert_ffn_hidden_size:
            raise ConfigError("num_experts is 0, so experts_per_token and expert_ffn_hidden_size must be 0")
        if self.patch_embedding_size % 4:
            raise ConfigError(f"patch_embedding_size ({self.patch_embedding_size}) must be a multiple of 4")
        if (self.patch_size, self.merge_size) != (16, 2):
            raise ConfigError(
                f"patch_size {self.patch_size} with merge_size {self.merge_size}: NEO is defined for 16 and 2 only"
            )

    @property
    def num_layers(self) -> int:
        return self.pre_buffer_layers + self.post_llm_layers

    @property
    def form(self) -> AttentionForm:
        return FORMS[self.attention_form]

    @property
    def image_token_ids(self) -> dict[str, int]:
        """Ids by token."""
        return {"<img>": self.image_start_token_id, "<IMG_CONTEXT>": self.image_context_token_id}

    @property
    def query_key_dim(self) -> int:
        """Width of a query or key head."""
        return self.form.query_key_widths * self.head_dim

    @property
    def attention_widths(self) -> tuple[int, int]:
        """Width of a query or key head, and of a value head."""
        return self.query_key_dim, self.head_dim

    @property
    def axis_widths(self) -> tuple[int, int, int]:
        """Channels of a query or key head for t, h and w."""
        return self.query_key_dim // 2, self.query_key_dim // 4, self.query_key_dim // 4

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "NeoSizes":
        """Reads the published `config.json`, its values plain or in one-element lists.

        Incomplete ones are completed first, by `checkpoint/published_config.py`.
        """
        try:
            llm, vision = config["llm_config"], config["vision_config"]
            value = {key: scalar(item) for key, item in {**llm, **vision}.items()}
            # transformers 5 puts the rotary base into a dictionary
            rotation = value if "rope_theta" in value else value["rope_parameters"]
            decoder = {key: scalar(item) for key, item in llm.items()}
            asked = beyond_qwen3(decoder)
            downsample = float(scalar(vision["downsample_ratio"]))
            sizes = dict(
                hidden_size=scalar(llm["hidden_size"]),
                ffn_hidden_size=value["intermediate_size"],
                num_attention_heads=value["num_attention_heads"],
                num_query_groups=value["num_key_value_heads"],
                head_dim=value["head_dim"],
                pre_buffer_layers=value["extra_num_layers"],
                post_llm_layers=value["num_hidden_layers"] - value["extra_num_layers"],
                vocab_size=value["vocab_size"],
                tie_word_embeddings=bool(
                    scalar(config.get("tie_word_embeddings", value.get("tie_word_embeddings", False)))
                ),
                patch_embedding_size=scalar(vision["hidden_size"]),
                patch_size=value["patch_size"],
                merge_size=round(1 / downsample),
                rope_theta=float(rotation["rope_theta"]),
                rope_theta_hw=float(value["rope_theta_hw"]),
                rope_theta_patch=float(value.get("rope_theta_vision", 1e4)),
                norm_epsilon=value["rms_norm_eps"],
                max_positions=value["max_position_embeddings"],
                max_positions_hw=value.get("max_position_embeddings_hw", 10000),
                min_pixels=value.get("min_pixels", 65536),
                max_pixels=value.get("max_pixels", 4194304),
                image_start_token_id=scalar(config.get("img_start_token_id", 151670)),
                image_context_token_id=scalar(config.get("img_context_token_id", 151669)),
                attention_form=value.get("attention_form", "separate"),
                **experts_from_qwen3(decoder),
            )
        except KeyError as missing:
            raise ConfigError(f"not a NEO config.json: key {missing} is missing") from missing
        except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise ConfigError(f"not a NEO config.json: a size in it is not a number ({error})") from error
        if asked:
            raise ConfigError(f"llm_config sets {asked}: NEO's decoder is a plain Qwen3")
        return cls(**sizes)

    def to_hf(self) -> dict[str, Any]:
        """The published `config.json`, all values plain scalars."""
        # NEO 1.0, whose published configuration has no such key, is what its absence means.
        form: dict[str, Any] = {} if self.attention_form == "separate" else {"attention_form": self.attention_form}
        kind, architecture = ("qwen3_moe", "Qwen3MoeForCausalLM") if self.num_experts else ("qwen3", "Qwen3ForCausalLM")
        if self.num_experts:
            form |= {
                "num_experts": self.num_experts,
                "num_experts_per_tok": self.experts_per_token,
                "moe_intermediate_size": self.expert_ffn_hidden_size,
                "norm_topk_prob": self.norm_topk_prob,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        return {
            "architectures": ["NEOChatModel"],
            "model_type": "neo_chat",
            "downsample_ratio": 1 / self.merge_size,
            "template": "neo1_0",
            "hidden_size": self.hidden_size,
            "img_start_token_id": self.image_start_token_id,
            "img_context_token_id": self.image_context_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
            "llm_config": {
                "architectures": [architecture],
                "model_type": kind,
                "attention_bias": False,
                "attention_dropout": 0.0,
                "extra_num_layers": self.pre_buffer_layers,
                "head_dim": self.head_dim,
                "hidden_act": "silu",
                "hidden_size": self.hidden_size,
                "initializer_range": 0.02,
                "intermediate_size": self.ffn_hidden_size,
                "max_position_embeddings": self.max_positions,
                "max_position_embeddings_hw": self.max_positions_hw,
                "num_attention_heads": self.num_attention_heads,
                "num_hidden_layers": self.num_layers,
                "num_key_value_heads": self.num_query_groups,
                "rms_norm_eps": self.norm_epsilon,
                "rope_theta": self.rope_theta,
                "rope_theta_hw": self.rope_theta_hw,
                "tie_word_embeddings": self.tie_word_embeddings,
                "use_cache": True,
                "vocab_size": self.vocab_size,
                **form,
            },
            "vision_config": {
                "model_type": "neo_vision",
                "downsample_ratio": 1 / self.merge_size,
                "hidden_size": self.patch_embedding_size,
                "llm_hidden_size": self.hidden_size,
                "max_pixels": self.max_pixels,
                "max_position_embeddings_vision": 10000,
                "min_pixels": self.min_pixels,
                "num_channels": 3,
                "patch_size": self.patch_size,
                "rope_theta_vision": self.rope_theta_patch,
            },
        }

    def replace(self, **changes: Any) -> "NeoSizes":
        return dataclasses.replace(self, **changes)


# Fields that checkpoints saved by version 0.1 do not have, and what those models are.
_SINCE_0_2 = ("attention_form", "num_experts", "experts_per_token", "expert_ffn_hidden_size", "norm_topk_prob")


def completed_sizes(saved: dict[str, Any]) -> dict[str, Any]:
    """The fields of `NeoSizes` in a checkpoint, with those that an earlier version did not save."""
    return {name: getattr(NeoSizes, name) for name in _SINCE_0_2} | saved


def experts_from_qwen3(decoder: dict[str, Any]) -> dict[str, Any]:
    """The fields of `NeoSizes` about experts, from the keys of a Qwen3-MoE; empty for a dense model.

    A Qwen3 that counts one expert is dense, as in the published code.

    Raises:
        KeyError: a key is missing. ConfigError: not all layers are alike.
    """
    experts = decoder.get("num_experts") or decoder.get("num_local_experts")  # the latter since transformers 5
    declared = f"{decoder.get('model_type')} {decoder.get('architectures')}".lower()
    if not experts or (experts == 1 and "moe" not in declared):
        return {}
    step, dense = decoder.get("decoder_sparse_step", 1), decoder.get("mlp_only_layers") or []
    if step != 1 or dense:
        raise ConfigError(
            f"decoder_sparse_step is {step} and mlp_only_layers {dense}, but every layer of NEO has experts"
        )
    return {
        "num_experts": experts,
        "experts_per_token": decoder["num_experts_per_tok"],
        "expert_ffn_hidden_size": decoder["moe_intermediate_size"],
        "norm_topk_prob": bool(decoder.get("norm_topk_prob", False)),  # Qwen3-MoE's own default
    }


def beyond_qwen3(decoder: dict[str, Any]) -> str | None:
    """Names what a decoder's configuration asks for and NEO does not have, so that it is never ignored silently."""

    def scaled(key: str) -> bool:
        rotation = decoder.get(key) or {}
        return not isinstance(rotation, dict) or rotation.get("rope_type", rotation.get("type", "default")) != "default"

    asked = [key for key in ("attention_bias", "use_sliding_window") if decoder.get(key)]
    asked += [key for key in ("rope_scaling", "rope_parameters") if scaled(key)]
    asked += ["hidden_act"] if decoder.get("hidden_act", "silu") != "silu" else []
    kinds = decoder.get("layer_types") or []
    asked += ["layer_types"] if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds) else []
    return f"{asked[0]} to {decoder[asked[0]]!r}" if asked else None


def _check_field(name: str, value: Any) -> None:
    """Checks type and range of a field: a whole number for counts, 1 or more unless a model can have none."""
    if name == "attention_form":
        if value not in FORMS:
            raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(FORMS)}")
        return
    if name in ("tie_word_embeddings", "norm_topk_prob"):
        if type(value) is not bool:
            raise ConfigError(f"{name} is {value!r}: it must be true or false")
        return
    if name.startswith("rope_theta") or name == "norm_epsilon":
        limit = 1 if name == "norm_epsilon" else _LARGEST_BASE
        if type(value) not in (int, float) or not 0 < value < limit:
            raise ConfigError(f"{name} is {value!r}: it must be a positive number below {limit:g}")
        return
    smallest = 0 if name.endswith(("_layers", "_token_id")) or "expert" in name else 1
    largest = MAX_PIXELS if name.endswith("_pixels") else _LARGEST_COUNT
    if type(value) is not int or not smallest <= value <= largest:
        raise ConfigError(f"{name} is {value!r}: it must be a whole number, {smallest} to {largest}")


def scalar(value: Any) -> Any:
    """A released config wraps some numbers in one-element lists; lists of words stay lists."""
    return value[0] if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], str) else value
