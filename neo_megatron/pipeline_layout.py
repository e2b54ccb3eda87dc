"""The pre-buffer on pipeline stages of its own, as a `--pipeline-model-parallel-layout` for Megatron."""

from neo_megatron.model.config import ConfigError


def pre_buffer_layout(pre_buffer_layers: int, post_llm_layers: int, pre_buffer_stages: int, stages: int) -> str:
    """The layout string: the first `pre_buffer_stages` hold embeddings and pre-buffer, the others post-LLM and head.

    Within each part layers are spread evenly, the earlier stages taking what is left over: the last stage also has the
    head.

    Raises:
        ConfigError: fewer than one stage for either part, or fewer layers than stages.
    """
    post_llm_stages = stages - pre_buffer_stages
    if pre_buffer_stages < 1 or post_llm_stages < 1:
        raise ConfigError(
            f"--pre-buffer-pipeline-stages {pre_buffer_stages} with --pipeline-model-parallel-size {stages}: "
            "both the pre-buffer and the post-LLM need at least one stage"
        )
    counts = [*_spread(pre_buffer_layers, pre_buffer_stages), *_spread(post_llm_layers, post_llm_stages)]
    if not all(counts):
        raise ConfigError(
            f"--pre-buffer-pipeline-stages {pre_buffer_stages} with --pipeline-model-parallel-size {stages}: "
            f"{pre_buffer_layers} pre-buffer and {post_llm_layers} post-LLM layers are fewer than their stages"
        )
    parts = ["t" * count for count in counts]
    parts[0] = "E" + parts[0]
    parts[-1] += "L"
    return "|".join(parts)


def _spread(layers: int, stages: int) -> list[int]:
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]
