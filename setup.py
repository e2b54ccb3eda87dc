"""Installation: `pip install .` brings all that the CPU path needs; extras add the rest."""

from setuptools import find_packages, setup

VIDEO = ["av>=18"]  # earlier ones crash on some files
S3 = ["multi-storage-client[boto3]>=1.3"]
RAY = ["ray>=2.40"]
BENCHMARK = ["scikit-image==0.26.0", "scikit-learn==1.9.1", "dashscope==2.0.2", "moto[server]>=5", *S3]

setup(
    name="neo-megatron",
    version="0.1.0",
    description="3D-parallel pretraining of NEO native vision-language models on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["neo_megatron", "neo_megatron.*"]),
    package_data={"neo_megatron.hf": ["*.jinja"]},
    # cpu_platform.py patches functions of exactly these two; it refuses to run on others.
    install_requires=[
        "torch==2.11.*",
        "megatron-core==0.19.2",
        "transformers>=4.57,<6",
        "safetensors>=0.5",
        "huggingface_hub>=0.34",
        "tokenizers>=0.22",
        "pillow>=13",  # earlier ones resize some pictures to other pixels than the published ones
        "numpy>=2",
        "psutil>=5.9",  # Megatron saves checkpoints with it and does not ask for it
        "pyyaml>=6",
        "tqdm>=4.66",
        "tensorboard>=2.18",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]==2.20.*"],
        "quickstart": ["easy-vqa==1.0"],
        "lmms-eval": ["lmms-eval==0.7.3"],  # wants an av below 16: not together with "video"
        "video": VIDEO,
        "s3": S3,
        "ray": RAY,
        "benchmark": BENCHMARK,
        "test": [
            "accelerate>=1.1",  # the Trainer of transformers and device_map ask for it
            *("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "requests>=2", "moto[server]>=5", "dashscope==2.0.2"),
            *("ruff>=0.12", "easy-vqa==1.0", *VIDEO, *S3, *RAY),
        ],
    },
    entry_points={
        "console_scripts": ["pretrain-neo = neo_megatron.pretrain_neo:main"],
        "lmms_eval.models": ["neo = neo_megatron.lmms_eval_plugin:manifest"],
    },
)
