"""Metadata, dependencies and extras of hf_jacobi."""

import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "src/hf_jacobi/__init__.py").read_text()).group(1)

EXTRAS = {
    "demo": ["gguf>=0.10.0", "accelerate>=1.10", "peft>=0.19", "rich>=13"],
    "train": ["peft>=0.19", "trl>=1.0", "datasets>=4.0", "accelerate>=1.10"],
    "eval": ["evaluate>=0.4.6", "datasets>=4.0", "matplotlib>=3.8", "accelerate>=1.10", "peft>=0.19"],
    "harness": ["lm-eval>=0.4.13", "accelerate>=1.10", "peft>=0.19"],  # which needs packages that come as source only
    "flash": ["flash-attn>=2.7"],
    "serve": [  # as transformers' own extra `serving`, and what adapters and colours need
        "fastapi>=0.110",
        "starlette>=0.36",
        "uvicorn>=0.29",
        "openai>=1.98.0",
        "pydantic>=2",
        "rich>=13",
        "peft>=0.19",
    ],
    "vllm": ['vllm>=0.32; python_version >= "3.11"'],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "peft>=0.19",
        "datasets>=4.0",
        "accelerate>=1.10",
        "trl>=1.0",
        "matplotlib>=3.8",
        "rich>=13",
        "evaluate>=0.4.6",
        "gguf>=0.10.0",
        "nbclient>=0.10",
        "ipykernel>=6.29",
        "pandas>=2",
    ],
    "docs": ["mkdocs-material>=9.5", "mkdocstrings-python>=1.10"],
    "dev": ["ruff>=0.14", "mypy>=1.13", "pre-commit>=4"],
}

setup(
    name="hf_jacobi",
    version=VERSION,
    description="Makes a Hugging Face causal language model decode many tokens per forward",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The hf_jacobi authors",
    keywords=["transformers", "parallel decoding", "jacobi decoding", "speculative decoding", "inference", "LoRA"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "hf_jacobi": [
            "py.typed",
            "checkpoints/*/*",
            "evaluation/metrics/*/*.py",
            "evaluation/tasks/*",
            "serving/page/*",
        ]
    },
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "transformers>=5.16,<5.25", "numpy", "safetensors", "huggingface_hub", "tqdm"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hf-jacobi = hf_jacobi.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
