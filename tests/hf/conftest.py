"""The golden model as transformers sees it."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.hf.modeling_neo import NEOChatModel

if transformers.__version__.startswith("4."):
    # The Trainer of 4.57 imports datasets where it is installed; that of the environment needs a newer huggingface_hub.
    transformers.utils.import_utils._datasets_available = False


def pytest_report_header() -> str:
    return f"with transformers {transformers.__version__}"


@pytest.fixture(scope="session")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint, through Megatron's form, as `megatron-to-hf` writes it."""
    directory = tmp_path_factory.mktemp("exported")
    convert_hf_to_megatron(golden / "ckpt_untied", directory / "megatron")
    convert_megatron_to_hf(directory / "megatron", directory / "hf", load_tokenizer(golden / "tokenizer"))
    return directory / "hf"


@pytest.fixture(scope="session")
def model(golden: Path) -> NEOChatModel:
    return NEOChatModel.from_pretrained(golden / "ckpt_untied", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def document(golden: Path) -> dict[str, torch.Tensor]:
    """The first golden document, two images in it, as arguments of `forward`."""
    inputs = load_file(golden / "inputs_pack1.safetensors")
    length = int(inputs["seq_boundaries"][1])
    return {"input_ids": inputs["input_ids"][:, :length]} | {key: inputs[key] for key in ("pixel_values", "grid_hw")}
