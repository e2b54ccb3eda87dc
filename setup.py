"""Installation: `pip install .` brings all that the CPU path needs; extras add the rest."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
URL = "https://github.com/neo-megatron/neo_megatron"


def version() -> str:
    """Reads `__version__` from the package without importing it, because torch may not be installed yet."""
    tree = ast.parse((ROOT / "neo_megatron" / "__init__.py").read_text())
    return next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )


# Upper bounds are what was tested (docs/compatibility.md); a release that came later may break a promise silently.
VIDEO = ["av>=19,<20"]  # earlier ones crash on some files
S3 = ["multi-storage-client[boto3]>=1.3"]
RAY = ["ray>=2.40,<2.61"]
PARQUET = ["pyarrow>=18,<27"]
# What Gradio 6.31 asks for, with its bounds, except Pillow below 13: it works with 13 too. tools/lock.sh adds Gradio
# itself to the environments of this repository.
DEMO = [
    *("anyio>=4.8,<5", "brotli>=1.2.1", "fastapi>=0.115.2,<1", "gradio-client==2.7.2", "groovy~=0.1", "hf-gradio~=0.4"),
    *("httpx>=0.27,<1", "jinja2>=3.1,<4", "markupsafe>=2.1.5,<4", "orjson~=3.10", "packaging>=24", "pandas>=2.2,<4"),
    *("pydantic>=2.11,<=3", "pydub>=0.25,<1", "python-multipart>=0.0.18,<1", "pytz>=2024.1", "safehttpx>=0.1.7,<0.2"),
    *("semantic-version~=2.10", "starlette>=1.0.1,<2", "tomlkit>=0.12,<0.15", "typer>=0.12,<1"),
    *("typing-extensions~=4.12", "uvicorn>=0.30"),
]
MUON = ["emerging-optimizers>=0.3,<0.4"]
TRACKERS = ["wandb>=0.31,<1", "mlflow-skinny>=3,<4"]
# mkdocstrings formats signatures with ruff.
DOCS = ["mkdocs>=1.6.1,<2", "mkdocs-material>=9.8.2,<10", "mkdocstrings[python]>=1.0.8,<2", "ruff>=0.17,<0.18"]
BENCHMARK = ["scikit-image==0.26.0", "scikit-learn==1.9.1", "dashscope==2.0.2", "moto[server]>=5.1", *S3]

setup(
    name="neo-megatron",
    version=version(),
    description="3D-parallel pretraining of NEO native vision-language models on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The neo_megatron authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    url=URL,
    project_urls={
        "Documentation": f"{URL}/tree/main/docs",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
        "Issues": f"{URL}/issues",
    },
    keywords=["vision-language model", "multimodal", "pretraining", "Megatron", "parallelism", "NEO", "Qwen3"],
    # No license classifier: PEP 639 replaces it by the license expression, and setuptools rejects both together.
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.12,<3.13",
    packages=find_packages(include=["neo_megatron", "neo_megatron.*"]),
    package_data={
        "neo_megatron": ["py.typed"],
        "neo_megatron.hf": ["*.jinja"],
        "neo_megatron.inspection": ["*.html", "*.css", "*.js"],
        "neo_megatron.inference": ["*.html"],
        "neo_megatron.follow": ["*.html"],
        "neo_megatron.demo": ["*.js", "*.css"],
    },
    # megatron_compat patches functions of exactly these two; it refuses to run on others.
    install_requires=[
        "torch==2.11.*",
        "megatron-core==0.19.2",
        "transformers>=4.57,<5.25",
        "safetensors>=0.5,<1",
        "huggingface_hub>=0.34,<3",
        "tokenizers>=0.22,<0.24",
        "pillow>=13,<14",  # earlier ones resize some images to other pixels than the published ones
        "numpy>=2.1,<2.6",
        "psutil>=5.9.8,<8",  # Megatron saves checkpoints with it and does not ask for it
        "pyyaml>=6.0.2,<7",
        "tqdm>=4.66,<5",
        "tensorboard>=2.18,<3",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]==2.20.*"],
        "quickstart": ["easy-vqa==1.0"],
        # Wants an av below 16, so that it cannot be installed with "video"; filelock 4.3 took away what it imports.
        "lmms-eval": ["lmms-eval==0.7.3", "filelock>=3.16,<4.3"],
        "video": VIDEO,
        "s3": S3,
        "ray": RAY,
        "parquet": PARQUET,
        "demo": DEMO,
        "muon": MUON,
        "trackers": TRACKERS,
        "benchmark": BENCHMARK,
        "docs": DOCS,
        "test": [
            "accelerate>=1.1",  # the Trainer of transformers and device_map ask for it
            *("trl>=1.16", "peft>=0.21", "datasets>=4"),  # what people fine-tune exports with
            *(
                "pytest>=8",
                "pytest-xdist>=3.6",
                "hypothesis>=6.100",
                "requests>=2.32",
                "moto[server]>=5.1",
                "dashscope==2.0.2",
            ),
            "openai>=2.25",  # asked for by `transformers serve`, next to what the demo has
            # tests/lint.sh
            *("ruff>=0.17,<0.18", "codespell>=2.4,<3", "mypy>=2.4,<3", "types-PyYAML>=6.0.12,<7"),
            *("easy-vqa==1.0", "playwright>=1.50", *VIDEO, *S3, *RAY, *PARQUET, *TRACKERS, *MUON, *DEMO),
        ],
    },
    entry_points={
        "console_scripts": [
            "neo-megatron = neo_megatron.cli.entry:main",
            "pretrain-neo = neo_megatron.pretrain_neo:main",
        ],
        "lmms_eval.models": ["neo = neo_megatron.lmms_eval_plugin:manifest"],
        "vllm.general_plugins": ["neo = neo_megatron.vllm_plugin.registration:register"],
    },
)
