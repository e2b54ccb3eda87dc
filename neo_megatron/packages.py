"""The packages to install when optional imports fail, with the versions of the extras in `setup.py`."""

from importlib.util import find_spec

# Import name -> requirement for pip, of packages that neo_megatron can do without.
OPTIONAL = {
    "transformer_engine": "transformer-engine[pytorch]==2.20.*",
    "flash_attn": "flash-attn-4",
    "easy_vqa": "easy-vqa==1.0",
    "lmms_eval": "lmms-eval==0.7.3",
    "av": "av>=19,<20",
    "multistorageclient": "multi-storage-client[boto3]>=1.3",
    "emerging_optimizers": "emerging-optimizers>=0.3,<0.4",
    "wandb": "wandb>=0.31,<1",
    "mlflow": "mlflow-skinny>=3,<4",
    "ray": "ray>=2.40,<2.61",
    "pyarrow": "pyarrow>=18,<27",
}


def is_installed(module: str) -> bool:
    """Whether an optional package can be imported, without importing it."""
    return find_spec(module) is not None


def install(module: str) -> str:
    """The command that installs an optional package, given its import name."""
    return f"pip install '{OPTIONAL[module]}'"
