"""NEO for vLLM 0.32: `vllm serve DIR` of an exported checkpoint, without its remote code.

vLLM finds it through the entry point of its group `vllm.general_plugins` in setup.py, and calls `register` in each of
its processes. The package imports neither Megatron nor a module that does: it runs with vLLM's version of PyTorch.
"""

ARCHITECTURE = "NEOChatModel"
MODE = "neo"
"""The name of NEO's tokenizer and renderer among the values of `--tokenizer-mode`."""
