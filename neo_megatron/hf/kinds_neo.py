"""Refuses checkpoints that are declared as `neo_chat` but are not a NEO that this code runs."""

from typing import Any

# Names of the conversation format of the tokenizer's template and of `chat()`.
TEMPLATES = ("neo1_0",)
# Keys of NEO-unify (SenseNova-U1), which has the same model_type and class names.
UNIFY_KEYS = (
    "fm_head_dim",
    "fm_head_layers",
    "timestep_shift",
    "noise_scale",
    "use_pixel_head",
    "extra_num_layers_post",
)


def refuse_generation(config: dict[str, Any], where: str = "config.json") -> None:
    """Raises for a published NEO-unify, whose tensors are those of two branches, understanding and generation.

    Raises:
        ValueError: the sentence has the key by which it was recognised.
    """
    if key := next((key for key in UNIFY_KEYS if key in config), None):
        raise ValueError(
            f"{where} has {key}: this is a NEO-unify (SenseNova-U1) checkpoint with a generation branch, which this "
            "code does not run; convert it with neo_megatron, which takes its understanding branch"
        )


def refuse_other_kinds(config: dict[str, Any], where: str = "config.json") -> None:
    """Raises for a `neo_chat` that this code does not run.

    Args:
        config: the keys of a `config.json`.

    Raises:
        ValueError: a quantised checkpoint; a template of another generation.
    """
    llm = config.get("llm_config")
    llm = llm if isinstance(llm, dict) else {}
    quantised = config.get("quantization_config") or llm.get("quantization_config")
    if quantised:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ValueError(
            f"{where} has a quantization_config ({kind}): this is a quantised checkpoint; give the one it was made from"
        )
    template = config.get("template")
    # A NEO under another model's name also has that model's template.
    if config.get("model_type", "neo_chat") == "neo_chat" and template is not None and template not in TEMPLATES:
        raise ValueError(
            f"{where} has the template {template!r}, and NEO knows {', '.join(map(repr, TEMPLATES))}: if the model was "
            "trained on conversations of that form, write that into config.json"
        )
