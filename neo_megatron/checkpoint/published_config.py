"""Completes a published `config.json` of any form from the tensors and the tokenizer next to it.

Published configurations differ: some lack keys that later code reads, and a stage-1 checkpoint is declared as an
InternVL whose code is missing. The tensors decide what a checkpoint is. Values that no tensor determines, such as a
rotary base, are those of the published models. Every addition and correction is reported.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from neo_megatron.checked_files import read_json
from neo_megatron.checkpoint.names import DECODER, LM_HEAD, PATCH_EMBEDDING, WORD_EMBEDDING, Shape
from neo_megatron.errors import CheckpointError
from neo_megatron.hf.kinds_neo import UNIFY_KEYS, refuse_other_kinds
from neo_megatron.model.attention_forms import FORMS
from neo_megatron.model.config import NeoSizes, scalar
from neo_megatron.presets import PUBLISHED_SIZES

MODEL_TYPE = "neo_chat"
_FIRST_LAYER = DECODER + "layers.0."
# No other model has all of these, and one of the tensors of a form.
_MARKS = (
    PATCH_EMBEDDING + "patch_embedding.weight",
    PATCH_EMBEDDING + "dense_embedding.weight",
    WORD_EMBEDDING,
)
_TENSOR_OF_FORM = {
    "separate": _FIRST_LAYER + "self_attn.q_proj_hw.weight",
    "in-head": _FIRST_LAYER + "self_attn.q_norm_hw.weight",
}
# NEO-unify has these keys at the top of `config.json`.
_MOVED = ("min_pixels", "max_pixels", "patch_size")
# Attention form, and whether there are experts -> a published model, for values that no tensor determines.
_PUBLISHED = {("in-head", False): "u1-8b", ("in-head", True): "u1-a3b"}
_OTHERWISE = "neo-2b"


def is_neo(shapes: dict[str, Shape]) -> bool:
    """Whether tensors of these names are those of a NEO, whatever the configuration says."""
    return _form(shapes) is not None and all(name in shapes for name in _MARKS)


def of_generation(name: str) -> bool:
    """Whether a tensor belongs to the generation branch of a NEO-unify (SenseNova-U1)."""
    return "mot_gen" in name or "fm_modules" in name


def _form(shapes: dict[str, Shape]) -> str | None:
    """The attention form of tensors; ``None`` if they have neither."""
    return next((form for form, name in _TENSOR_OF_FORM.items() if name in shapes), None)


def complete_config(
    config: dict[str, Any], shapes: dict[str, Shape], directory: Path, token_ids: Mapping[str, int] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The configuration with all keys that `NeoSizes.from_hf` reads, and a sentence for every correction.

    It is that of the understanding branch of a NEO-unify: keys of its generation branch are left out.

    Args:
        config: `config.json` as it is; not changed.
        shapes: of the tensors in ``directory``.
        directory: whose tokenizer, if it has one, knows the ids of the image tokens.
        token_ids: of image tokens, for a directory that does not tell.

    Raises:
        CheckpointError: the tensors are not those of a NEO; a mixture of experts, a quantised checkpoint, an unknown
            template; the ids of the image tokens are unknown; a value is of another type.
    """
    refuse_other_kinds(config, f"{directory}/config.json")
    said: list[str] = []
    llm, vision = (_plain(config.get(name)) for name in ("llm_config", "vision_config"))
    top = _plain(config) | {"llm_config": llm, "vision_config": vision}
    unify = [key for key in UNIFY_KEYS if top.pop(key, None) is not None]
    if top.get("model_type") != MODEL_TYPE:
        if not is_neo(shapes):
            lacking = next((name for name in _MARKS if name not in shapes), _TENSOR_OF_FORM["separate"])
            raise CheckpointError(
                f"{directory}: not a NEO (model_type {top.get('model_type')!r}, and it lacks {lacking}): "
                "give a NEO checkpoint, or start one from a Qwen3 with qwen3-to-neo"
            )
        said.append(f"model_type is {top.get('model_type')!r}, but the tensors are a NEO's: read as {MODEL_TYPE!r}")
        top |= {"model_type": MODEL_TYPE, "architectures": ["NEOChatModel"]}
    if absent := [name for name in code_files(config.get("auto_map")) if not (directory / name).is_file()]:
        said.append(f"auto_map names {', '.join(absent)}, not there: ignored, an export carries the right code")
    _check_types(llm, directory)
    _complete_form(llm, shapes, unify, directory, said)
    _complete_layers(llm, shapes, said)
    _complete_experts(llm, shapes, said)
    _fill(llm, _llm_sizes(shapes), "in the tensors", said)
    _complete_rotation(llm, directory)
    published = PUBLISHED_SIZES[_PUBLISHED.get((llm.get("attention_form"), bool(llm.get("num_experts"))), _OTHERWISE)]
    undetermined = {
        "rope_theta": published.rope_theta,
        "rope_theta_hw": published.rope_theta_hw,
        "rms_norm_eps": published.norm_epsilon,
        "max_position_embeddings": published.max_positions,
    }
    _fill(llm, undetermined, "in the published models", said)
    _fill(vision, _vision_sizes(shapes), "in the tensors", said)
    _complete_moved(vision, top, said)
    _fill(vision, {"rope_theta_vision": published.rope_theta_patch}, "in the published models", said)
    _complete_tying(top, llm, LM_HEAD in shapes, said)
    _complete_token_ids(top, llm.get("vocab_size") or 0, directory, token_ids or {}, said)
    return top, said


def _plain(section: Any) -> dict[str, Any]:
    return {key: scalar(value) for key, value in section.items()} if isinstance(section, dict) else {}


def _check_types(llm: dict[str, Any], directory: Path) -> None:
    """Checks the values used here; `NeoSizes` checks all of them."""
    kinds = dict.fromkeys(("num_hidden_layers", "extra_num_layers", "vocab_size"), int) | {"rope_parameters": dict}
    for key, kind in kinds.items():
        if not isinstance(llm.get(key), kind | None):
            raise CheckpointError(f"{directory}/config.json: {key} in llm_config is {llm[key]!r}: download it again")


def _fill(config: dict[str, Any], values: dict[str, Any], where: str, said: list[str]) -> None:
    for key, value in values.items():
        if config.get(key) is None:
            config[key] = value
            said.append(f"{key} is missing: {value}, as {where}")


def _complete_form(
    llm: dict[str, Any], shapes: dict[str, Shape], unify: list[str], directory: Path, said: list[str]
) -> None:
    """NEO 1.0 and NEO-unify have one model_type and one architecture: the tensors tell them apart."""
    form = _form(shapes)
    if form is None:  # the check of all tensors reports it
        return
    if (named := llm.get("attention_form")) not in (None, form):
        raise CheckpointError(
            f"{directory}/config.json: attention_form is {named!r}, but the tensors have {_TENSOR_OF_FORM[form]}: "
            f"write {form!r}"
        )
    if named is None and form == "in-head":
        said.append(
            f"the tensors have {_TENSOR_OF_FORM[form]}, so this is a NEO-unify (SenseNova-U1), not a NEO 1.0: read "
            "with the attention form 'in-head'"
        )
    if form == "separate" and unify:
        said.append(
            f"{unify[0]} belongs to a NEO-unify (SenseNova-U1), but the tensors are those of a NEO 1.0: ignored"
        )
    if branch := sum(map(of_generation, shapes)):
        said.append(f"the {branch} tensors of the generation branch are left out")
    llm["attention_form"] = form


def _complete_layers(llm: dict[str, Any], shapes: dict[str, Shape], said: list[str]) -> None:
    """`num_hidden_layers` counts all layers, `extra_num_layers` those of the pre-buffer; the tensors have the total."""
    prefix = DECODER + "layers."
    total = len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})
    named, pre_buffer = llm.get("num_hidden_layers"), llm.get("extra_num_layers")
    if not total:
        return
    llm["num_hidden_layers"] = total
    if pre_buffer is not None:
        if named is None:
            said.append(f"num_hidden_layers is missing: {total}, as in the tensors")
        elif named + pre_buffer == total and pre_buffer:
            said.append(f"num_hidden_layers is {named}, without the pre-buffer: {total}, as in the tensors")
        else:
            llm["num_hidden_layers"] = named  # if it is wrong, the check of the tensors reports it
        return
    by_shape = {(size.hidden_size, size.num_layers): size.pre_buffer_layers for size in PUBLISHED_SIZES.values()}
    if named is not None and named < total:
        llm["extra_num_layers"] = total - named
        said.append(f"extra_num_layers is missing: {total - named}, as num_hidden_layers is {named} of {total} layers")
    elif (known := by_shape.get((_width(shapes), total))) is not None:
        llm["extra_num_layers"] = known
        said.append(f"extra_num_layers is missing: {known}, as in the published model of these sizes")
    else:
        llm["extra_num_layers"] = 0
        said.append("extra_num_layers is missing: 0, so all layers count as post-LLM; stage 1 needs the right number")


def _complete_experts(llm: dict[str, Any], shapes: dict[str, Shape], said: list[str]) -> None:
    """The tensors tell a mixture of experts from a dense model."""
    found = _feed_forward_sizes(shapes)
    if "num_experts" in found:
        if not llm.get("num_experts"):
            llm["num_experts"] = llm.get("num_local_experts")  # its name since transformers 5
        _fill(llm, {"norm_topk_prob": False}, "by default in a Qwen3-MoE", said)
    elif found and not any(name.startswith(DECODER) and ".mlp.experts." in name for name in shapes):
        for key in ("num_experts", "num_local_experts"):
            if experts := llm.pop(key, None):
                said.append(f"{key} is {experts}, but the tensors have no experts: read as a dense model")


def _complete_rotation(llm: dict[str, Any], directory: Path) -> None:
    """The rotary base, which transformers 5 puts into a dictionary."""
    base, stored = llm.get("rope_theta"), (llm.get("rope_parameters") or {}).get("rope_theta")
    if None not in (base, stored) and base != stored:
        raise CheckpointError(
            f"{directory}/config.json: llm_config has rope_theta {base!r} and, in rope_parameters, {stored!r}: delete "
            "the wrong one"
        )
    if base is None:
        llm["rope_theta"] = stored


def _complete_moved(vision: dict[str, Any], top: dict[str, Any], said: list[str]) -> None:
    _fill(vision, {key: top[key] for key in _MOVED if key in top}, "at the top of config.json", said)
    for key in _MOVED:
        if top.get(key, vision.get(key)) != vision.get(key):
            said.append(f"{key} is {top[key]} at the top of config.json: read as {vision[key]}, as in vision_config")


def _complete_tying(top: dict[str, Any], llm: dict[str, Any], has_head: bool, said: list[str]) -> None:
    """The top level of the configuration counts; where it contradicts the decoder's, the tensors decide."""
    model, decoder = top.get("tie_word_embeddings"), llm.get("tie_word_embeddings")
    if model is None and decoder is None:
        _fill(top, {"tie_word_embeddings": not has_head}, "in the tensors", said)
    elif model is False and decoder is True and not has_head:
        top["tie_word_embeddings"] = True
        said.append("tie_word_embeddings is False, but True in llm_config, and there is no head: read as True")
    elif model is True and not decoder and has_head and llm.get("attention_form") == "in-head":
        top["tie_word_embeddings"] = False
        said.append("tie_word_embeddings is True, but a NEO-unify has it in llm_config: read as False")


def _llm_sizes(shapes: dict[str, Shape]) -> dict[str, Any]:
    """Sizes read from the first layer's tensors; empty if one is missing, which the check of all tensors reports."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm")
    found = [shapes.get(f"{_FIRST_LAYER}{name}.weight") for name in names]
    if not all(found) or not _width(shapes):
        return {}
    (queries, *_), (keys, *_), (norm, *_) = found
    head_dim = norm * 2 // FORMS[_form(shapes) or "separate"].query_key_widths
    return {
        **_feed_forward_sizes(shapes),
        "vocab_size": shapes[WORD_EMBEDDING][0],
        "hidden_size": _width(shapes),
        "num_attention_heads": queries // max(1, head_dim),
        "num_key_value_heads": keys // max(1, head_dim),
        "head_dim": head_dim,
    }


def _feed_forward_sizes(shapes: dict[str, Shape]) -> dict[str, int]:
    """Of the SwiGLU, or of the experts in its place; how many of those a token goes to, no tensor says."""
    if gate := shapes.get(_FIRST_LAYER + "mlp.gate_proj.weight"):
        return {"intermediate_size": gate[0]}
    router, expert = (shapes.get(f"{_FIRST_LAYER}mlp.{name}.weight") for name in ("gate", "experts.0.gate_proj"))
    return {"num_experts": router[0], "moe_intermediate_size": expert[0]} if router and expert else {}


def _vision_sizes(shapes: dict[str, Shape]) -> dict[str, Any]:
    patches, cells = (shapes.get(f"{PATCH_EMBEDDING}{name}_embedding.weight", ()) for name in ("patch", "dense"))
    if len(patches) != 4 or len(cells) != 4:
        return {}
    return {
        "hidden_size": patches[0],
        "llm_hidden_size": cells[0],
        "patch_size": patches[2],
        "downsample_ratio": 1 / max(1, cells[2]),
    }


def _width(shapes: dict[str, Shape]) -> int:
    embedding = shapes.get(WORD_EMBEDDING, ())
    return embedding[1] if len(embedding) == 2 else 0


def _complete_token_ids(
    config: dict[str, Any], vocab_size: int, directory: Path, token_ids: Mapping[str, int], said: list[str]
) -> None:
    keys = {
        "img_start_token_id": ("<img>", NeoSizes.image_start_token_id),
        "img_context_token_id": ("<IMG_CONTEXT>", NeoSizes.image_context_token_id),
    }
    if all(config.get(key) is not None for key in keys):
        return
    ids = added_token_ids(directory)
    for key, (token, qwen3_id) in keys.items():
        if token in ids:
            _fill(config, {key: ids[token]}, "in the tokenizer", said)
        elif token in token_ids:
            _fill(config, {key: token_ids[token]}, "given", said)
        elif qwen3_id < vocab_size:
            _fill(config, {key: qwen3_id}, "on Qwen3's tokenizer", said)
        elif config.get(key) is None:
            raise CheckpointError(
                f"{directory}/config.json lacks {key}, and no tokenizer there knows {token}: "
                "write the id into config.json, put the model's tokenizer.json next to it, or convert it with "
                "hf-to-megatron --tokenizer"
            )


def added_token_ids(directory: Path) -> dict[str, int]:
    """The ids of the tokens that were added to a directory's tokenizer; empty where there is none."""
    readers: dict[str, Callable[[dict[str, Any]], Iterable[tuple[str, Any]]]] = {
        "tokenizer.json": lambda it: ((token["content"], token["id"]) for token in it.get("added_tokens", [])),
        "added_tokens.json": lambda it: it.items(),
        "tokenizer_config.json": lambda it: (
            (token["content"], number) for number, token in it.get("added_tokens_decoder", {}).items()
        ),
    }
    ids: dict[str, int] = {}
    for name, read in readers.items():
        if os.path.lexists(directory / name):
            contents = read_json(directory / name)
            try:
                ids = {token: int(number) for token, number in read(contents)} | ids
            except (TypeError, KeyError, AttributeError, ValueError) as error:
                raise CheckpointError(
                    f"{directory / name}: its added tokens are not a list of words and ids"
                ) from error
    return ids


def code_files(auto_map: Any) -> list[str]:
    """The files of its own directory that an `auto_map` names; those of other repositories are left out."""
    targets = [target for target in auto_map.values() if isinstance(target, str)] if isinstance(auto_map, dict) else []
    return sorted({target.split(".")[0] + ".py" for target in targets if "--" not in target})
