"""The entry point that vLLM calls; it imports vLLM only then."""

from neo_megatron.vllm_plugin import ARCHITECTURE, MODE

PACKAGE = "neo_megatron.vllm_plugin"


def register() -> None:
    """Tells vLLM of the configuration, the model, the tokenizer and the renderer; only vLLM calls it.

    Raises:
        RuntimeError: vLLM is not of the version whose interfaces this package was written for.
    """
    import vllm
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from neo_megatron.vllm_plugin.configuration import NEOServedConfig, NEOServing

    if vllm.__version__.split(".")[:2] != ["0", "32"]:
        raise RuntimeError(
            f"vLLM {vllm.__version__}: the plug-in of neo_megatron is written for 0.32; install that version, or set "
            "VLLM_PLUGINS to the plug-ins to load without it"
        )
    _CONFIG_REGISTRY[NEOServedConfig.model_type] = NEOServedConfig
    MODELS_CONFIG_MAP[ARCHITECTURE] = NEOServing
    ModelRegistry.register_model(ARCHITECTURE, f"{PACKAGE}.model:NEOChatModel")
    TokenizerRegistry.tokenizers[MODE] = (f"{PACKAGE}.tokenizer", "NEOTokenizer")
    RENDERER_REGISTRY.renderers[MODE] = (f"{PACKAGE}.tokenizer", "NEORenderer")
