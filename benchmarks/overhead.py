"""
Where the time of a step goes: inside the model's forward, and outside it.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import argparse
import functools
import time

import hf_jacobi
from hf_jacobi.cli.demo_model import DEMO_MODEL
from hf_jacobi.cli.models import encode, load
from hf_jacobi.evaluation.prompts import CHAT


CONFIGS = {"ar": None, "default": {}, "n16": {"block_size": 16}, "n64": {"block_size": 64}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a local folder or a Hub id (default: {DEMO_MODEL})")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    arguments = parser.parse_args()
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
