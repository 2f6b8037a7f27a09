"""Metadata, dependencies and extras of hf_jacobi."""

import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "src/hf_jacobi/__init__.py").read_text(encoding="utf-8"))[1]

EXTRAS = {
    "demo": ["gguf>=0.10.0", "accelerate>=1.10", "peft>=0.19", "rich>=13"],
    "train": ["peft>=0.19", "trl>=1.0", "datasets>=4.0", "pyarrow", "filelock", "accelerate>=1.10"],
    "eval": ["evaluate>=0.4.6", "datasets>=4.0", "matplotlib>=3.8", "accelerate>=1.10", "peft>=0.19"],
    "harness": ["lm-eval>=0.4.13", "accelerate>=1.10", "peft>=0.19"],  # some of its dependencies exist as source only
    "flash": ["flash-attn>=2.7"],
    "serve": [  # transformers' extra `serving`, adapters, colours in the terminal
        "fastapi>=0.110",
        "starlette>=0.36",
        "uvicorn>=0.29",
        "openai>=1.98.0",
        "pydantic>=2",
        "rich>=13",
        "peft>=0.19",
    ],
    "vllm": ["vllm>=0.32"],
    "test": [
        "pytest>=8",
        "pytest-cov>=7",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "peft>=0.19",
        "datasets>=4.0",
        "pyarrow",
        "filelock",
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
    "dev": ["ruff>=0.14", "mypy>=1.13", "types-PyYAML", "codespell>=2.4", "build>=1.2", "pre-commit>=4"],
}

setup(
    name="hf_jacobi",
    version=VERSION,
    description="Makes a Hugging Face causal language model decode many tokens per forward",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The hf_jacobi authors",
    project_urls={"Paper": "https://arxiv.org/abs/2512.14681"},
    keywords=["transformers", "parallel decoding", "jacobi decoding", "speculative decoding", "inference", "LoRA"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "hf_jacobi": [
            "py.typed",
            # Nearly all of the wheel's 25 MB. Its demo would not run without them, and an extra cannot name a package
            # of their own as long as no index has one.
            "checkpoints/*/*",
            "evaluation/metrics/*/*.py",
            "evaluation/tasks/*",
            "hub/*.jinja",
            "hub/*.pyi",
            "serving/page/*",
        ]
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "transformers>=5.16,<5.25",
        "numpy",
        "safetensors",
        "huggingface_hub",
        "jinja2",
        "pyyaml",
        "tqdm",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hf-jacobi = hf_jacobi.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
