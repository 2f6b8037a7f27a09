"""
Where the time of a step goes: inside the model's forward and outside it; and how many operations run outside.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --operations
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_jacobi
from hf_jacobi.cli.demo_model import DEMO_MODEL
from hf_jacobi.cli.models import encode, load
from hf_jacobi.decoding.slot_cache import SlotCache
from hf_jacobi.evaluation.prompts import CHAT


CONFIGS = {"ar": None, "default": {}, "n16": {"block_size": 16}, "n64": {"block_size": 64}}


SMALL = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SETTINGS = {"block_size": 16, "pool_size": 4, "seed": 0}
CALLS = {
    "greedy": (1, {}),
    "sampled": (1, {"do_sample": True, "top_k": 0}),
    "8 rows, sampled": (8, {"do_sample": True, "top_k": 0}),
}


class Operations(TorchDispatchMode):
    """
    Counts the operations that run outside a model's forwards; those of its cache belong to the forwards.

    Views also count: they are no work for the device, but cost the host as much as an operation.
    """

    def __init__(self, model):
        super().__init__()
        self.counts = Counter()
        self.forwards = 0
        self.inside = False
        self.model = model

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.inside:
            self.counts[str(function)] += 1
        return function(*args, **kwargs or {})

    def watch(self, owner, name: str, forward: bool = False) -> None:
        """Excludes from the count what runs inside a method."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def watched(*args, **kwargs):
            outer, self.inside = self.inside, True
            self.forwards += forward
            try:
                return method(*args, **kwargs)
            finally:
                self.inside = outer

        setattr(owner, name, watched)


def operations_per_step(rows: int, new_tokens: int = 400, **settings) -> tuple[float, Counter]:
    """
    Operations outside the model per step: the mean over the steps of a text, without prefill and ending.

    Args:
        rows: number of rows in the batch, of different lengths.
        new_tokens: length of the text.
        settings: further arguments of `generate`.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)
    model = hf_jacobi.enable(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    ids = torch.randint(3, 64, (rows, 24))
    mask = (torch.arange(24) >= torch.arange(rows).unsqueeze(1)).long()
    found = []
    for length in (new_tokens // 4, new_tokens):
        with Operations(model) as operations:
            operations.watch(model, "forward", forward=True)
            move = SlotCache.move
            operations.watch(SlotCache, "move")
            try:
                torch.manual_seed(0)
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=length,
                    decoding="jacobi",
                    jacobi_config=SETTINGS,
                    **settings,
                )
            finally:
                SlotCache.move = move
                del model.forward
        found.append((operations.forwards, operations.counts))
    (few, before), (many, after) = found
    counts = Counter({name: (after[name] - before[name]) / (many - few) for name in after})
    return sum(counts.values()), counts


def print_operations() -> None:
    """A table of `CALLS`."""
    print("| a step of | operations outside the model |")
    print("| --- | --- |")
    for name, (rows, settings) in CALLS.items():
        print(f"| {name} | {operations_per_step(rows, **settings)[0]:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a local folder or a Hub id (default: {DEMO_MODEL})")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--operations", action="store_true", help="count operations, on a small model")
    arguments = parser.parse_args()
    if arguments.operations:
        return print_operations()
    model, tokenizer = load(arguments.model)
    hf_jacobi.enable(model)
    inside = []
    forward = model.forward

    @functools.wraps(forward)
    def timed(*args, **kwargs):
        start = time.perf_counter()
        output = forward(*args, **kwargs)
        inside.append(time.perf_counter() - start)
        return output

    model.forward = timed
    print("| configuration | forwards | ms per forward | ms outside, per forward | share outside |")
    print("| --- | --- | --- | --- | --- |")
    for name, config in CONFIGS.items():
        chosen = {"decoding": "ar"} if config is None else {"decoding": "jacobi", "jacobi_config": config}
        inside.clear()
        total = 0.0
        for prompt in CHAT[: arguments.prompts]:
            inputs = encode(tokenizer, prompt, model.device)
            start = time.perf_counter()
            model.generate(**inputs, **chosen, do_sample=False, max_new_tokens=arguments.max_new_tokens)
            total += time.perf_counter() - start
        count, within = len(inside), sum(inside)
        print(
            f"| {name} | {count} | {1000 * within / count:.1f} | {1000 * (total - within) / count:.2f} "
            f"| {(total - within) / total:.1%} |"
        )


if __name__ == "__main__":
    main()
