"""
The greedy answers of SmolLM2 to prompts, in batches: text for a table of n-grams.

    python -m benchmarks.smollm2.texts prompts/train.jsonl texts.jsonl

writes `kind`, `prompt_ids` and `completion_ids` of each prompt. Run it again to go on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from hf_jacobi.cli.models import load
from hf_jacobi.trajectories.encoding import encode_messages


def answer(model, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The greedy answer to each prompt, with its end token."""
    longest, end = max(map(len, prompts)), model.generation_config.eos_token_id
    rows = [[end] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
    texts = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[:, longest:].tolist()
    return [text[: text.index(end) + 1] if end in text else text for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="train.jsonl of benchmarks.smollm2.prompts")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="the model that answers (default: the demo model)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--max-prompts", type=int)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model, "float32")
    rows = [json.loads(line) for line in arguments.prompts.read_text().splitlines()][: arguments.max_prompts]
    done = len(arguments.output.read_text().splitlines()) if arguments.output.exists() else 0
    with open(arguments.output, "a") as output:
        for start in tqdm(range(done, len(rows), arguments.batch_size)):
            some = rows[start : start + arguments.batch_size]
            prompts = [encode_messages(tokenizer, row["messages"]) for row in some]
            for row, prompt, text in zip(some, prompts, answer(model, prompts, arguments.max_new_tokens)):
                written = {"kind": row["kind"], "prompt_ids": prompt, "completion_ids": text}
                output.write(json.dumps(written) + "\n")
            output.flush()


if __name__ == "__main__":
    main()
