"""
Multi-block decoding where acceptance is high: tokens per forward for K = 1, 2, 3 blocks in flight.

    python -m benchmarks.multi_block

The model is the tests' fixture, trained once for a few seconds on x[i] = perm[x[i - 16]]: every token follows from the
token sixteen places before it, and no n-gram repeats within that distance.
"""

from __future__ import annotations

import torch

import hf_jacobi
from tests.fixtures import permuted_copy_batch, permuted_copy_model


PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 4, 40, 128


def main() -> None:
    model = hf_jacobi.enable(permuted_copy_model())
    prompts = permuted_copy_batch(PROMPTS, PROMPT_LENGTH, torch.Generator().manual_seed(5))
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    print("| window | block size | K | forwards | TPF | identical to AR |\n| --- | --- | --- | --- | --- | --- |")
    for window in ("block", "sliding"):
        for block_size in (8, 16):
            for blocks in (1, 2, 3):
                config = {"block_size": block_size, "window": window, "max_blocks": blocks, "pool_size": 0}
                forwards, same = 0, True
                for prompt in prompts.split(1):
                    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
                    out = model.generate(**inputs, **settings, decoding="jacobi", jacobi_config=config)
                    forwards += out.jacobi_stats.forwards
                    same &= torch.equal(out.sequences, model.generate(**inputs, **settings).sequences)
                tpf = PROMPTS * NEW_TOKENS / forwards
                print(f"| {window} | {block_size} | {blocks} | {forwards} | {tpf:.2f} | {'yes' if same else 'no'} |")


if __name__ == "__main__":
    main()
