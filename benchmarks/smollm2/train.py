"""
Trains the draft-only adapter of SmolLM2-135M-Instruct, from the one in the package or from new weights.

    python -m benchmarks.smollm2.prompts prompts
    hf-jacobi collect --dataset prompts/train.jsonl --output-dir trajectories --block-size 8 --max-new-tokens 128 \
        --batch-size 64 --dtype bfloat16
    python -m benchmarks.smollm2.train trajectories draft --steps 500

On a CPU that computes faster in float32 than in bfloat16, pass `--dtype float32` to both. An interrupted training
resumes from its last checkpoint. Losses and the share of noisy positions predicted correctly are kept in
`draft/jacobi_forcing.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

import hf_jacobi
from hf_jacobi.cli.demo_model import demo_checkpoint
from hf_jacobi.cli.models import DEMO_ADAPTER
from hf_jacobi.trajectories.prompts import open_prompts


WEIGHTS = "adapter_model.safetensors"


def rows_of(trajectories, copies: int, epochs: range) -> datasets.Dataset:
    """Packed rows with clean context, in the order of the prompts (kinds take turns); each epoch has other noise."""
    return datasets.concatenate_datasets(
        [
            hf_jacobi.pack_trajectories(trajectories, 1, "random", max_length=1536, noisy_copies=copies, seed=epoch)
            for epoch in epochs
        ]
    )


def widened(source: Path, rank: int, output: Path) -> Path:
    """A copy of a LoRA with a larger rank, in `output`; its new weights do nothing at first."""
    config = LoraConfig.from_pretrained(str(source))
    more = rank - config.r
    tensors = {}
    for name, weight in load_file(source / WEIGHTS).items():
        if "lora_A" in name:
            new = torch.randn(more, weight.shape[1]) / weight.shape[1] ** 0.5
            tensors[name] = torch.cat([weight, new.to(weight.dtype)])
        else:
            tensors[name] = torch.cat([weight, weight.new_zeros(len(weight), more)], dim=1)
    config.lora_alpha *= rank / config.r
    config.r = rank
    output.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(output))
    save_file(tensors, output / WEIGHTS)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trajectories", help="the folder that `hf-jacobi collect` wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="the base model (default: the demo model)")
    parser.add_argument("--new", type=int, metavar="RANK", help="begin with new weights of this rank")
    parser.add_argument("--widen", type=int, metavar="RANK", help="continue the adapter in the package at this rank")
    parser.add_argument("--last-layers", type=int, help="with --new: adapt only this many layers, the last ones")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--epoch", type=int, default=0, help="the number of earlier ones, which had other noise")
    parser.add_argument("--texts", type=int, default=4, help="in a step")
    parser.add_argument("--copies", type=int, default=4, help="noisy copies of each text")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--loss", default="soft")
    parser.add_argument("--accept-cut", action="store_true")
    arguments = parser.parse_args()
    base = arguments.model or demo_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=arguments.dtype, attn_implementation=None if torch.cuda.is_available() else "eager"
    )
    config = None
    if arguments.new:
        count = model.config.num_hidden_layers
        layers = list(range(count - (arguments.last_layers or count), count))
        names = {name for name, one in model.model.layers[0].named_modules() if isinstance(one, torch.nn.Linear)}
        config = LoraConfig(
            r=arguments.new,
            lora_alpha=2 * arguments.new,
            target_modules=sorted(name.rpartition(".")[2] for name in names),
            layers_to_transform=layers,
            task_type="CAUSAL_LM",
        )
    else:
        start = Path(DEMO_ADAPTER)
        if arguments.widen:
            start = widened(start, arguments.widen, arguments.output / "widened")
        model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    trajectories = open_prompts(arguments.trajectories)
    wanted = arguments.steps * arguments.texts
    epochs = range(arguments.epoch, arguments.epoch - (-wanted // len(trajectories)))
    rows = rows_of(trajectories, arguments.copies, epochs)
    training = arguments.output / "training"
    trainer = hf_jacobi.JacobiForcingTrainer(
        model,
        hf_jacobi.JacobiForcingConfig(
            str(training),
            per_device_train_batch_size=arguments.texts,
            max_steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            adam_beta2=0.98,
            consistency_loss=arguments.loss,
            accept_cut=arguments.accept_cut,
            adapter_scope="draft",
            compile_layers=True,
            bf16=arguments.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential",
            save_steps=25,
            save_total_limit=1,
            logging_steps=10,
            report_to="none",
            seed=0,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=config,
    )
    trainer.train(resume_from_checkpoint=training.is_dir() and get_last_checkpoint(str(training)))
    trainer.save_model(str(arguments.output))


if __name__ == "__main__":
    main()
