"""Which package to install where an import fails. Versions are those of the extras in `setup.py`."""

# Import name -> what pip installs: packages that are not installed with neo_megatron itself.
OPTIONAL = {
    "transformer_engine": "transformer-engine[pytorch]==2.20.*",
    "flash_attn": "flash-attn-4",
    "easy_vqa": "easy-vqa==1.0",
    "lmms_eval": "lmms-eval==0.7.3",
    "av": "av>=19,<20",
    "multistorageclient": "multi-storage-client[boto3]>=1.3",
    "ray": "ray>=2.40,<2.61",
}


def install(module: str) -> str:
    """The command that installs an optional package, by the name under which it is imported."""
    return f"pip install '{OPTIONAL[module]}'"
