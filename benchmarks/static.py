"""
Compiled steps of fixed shapes compared with eager steps: AR and Jacobi decoding, one prompt at a time.

    python -m benchmarks.static                         # the miniature that ships with the package
    python -m benchmarks.static --model FOLDER --prompts 12 --max-new-tokens 128

The ways take turns on each prompt. Each way decodes the first prompts before the clock starts, so that all its graphs
are compiled.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

import hf_jacobi
from hf_jacobi.cli.models import encode
from hf_jacobi.decoding.compat import compile_here
from hf_jacobi.evaluation.prompts import CHAT

from .miniature.tasks import held_out_problems


MINIATURE = Path(hf_jacobi.__file__).parent / "checkpoints" / "miniature"
SIZES = (4, 8, 16, 32)


def ways(static_length: int) -> dict[str, dict]:
    """The arguments of `generate` by name."""
    static = {"cache_implementation": "static", "max_cache_len": static_length}
    sliding = {f"n={n}": {"block_size": n, "pool_size": 0} for n in SIZES}
    found = {"ar": {"decoding": "ar"}, "ar, compiled": {"decoding": "ar"} | static | {"compile_config": compiled()}}
    for name, settings in {"default": {}, "n=16, pool 4": {"block_size": 16}, **sliding}.items():
        jacobi = {"decoding": "jacobi", "jacobi_config": settings}
        found |= {f"jacobi {name}": jacobi, f"jacobi {name}, compiled": jacobi | static}
    return found


def compiled() -> CompileConfig:
    """Compile settings that make transformers' own decoding as compiled as ours."""
    config = compile_here()
    config.mode, config.dynamic = None, False
    return config


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MINIATURE))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--warm-up", type=int, default=4, help="prompts before the clock starts")
    parser.add_argument("--only", nargs="*", help="measure only these ways, beside AR")
    arguments = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    hf_jacobi.enable(model)
    count = arguments.prompts + arguments.warm_up
    is_miniature = arguments.model == str(MINIATURE)
    problems = [problem.prompt for problem in held_out_problems(count)]  # for each of the two tasks
    texts = problems[::2] if is_miniature else (CHAT * count)[:count]
    inputs = [encode(tokenizer, text, model.device) for text in texts]
    longest = max(prompt["input_ids"].shape[1] for prompt in inputs) + arguments.max_new_tokens
    chosen = ways(longest)
    if arguments.only is not None:
        chosen = {name: way for name, way in chosen.items() if name.startswith("ar") or name in arguments.only}
    seconds, tokens, forwards, same = (dict.fromkeys(chosen, 0) for _ in range(4))
    for number, prompt in enumerate(inputs):
        expected = None
        for name, way in chosen.items():
            start = time.perf_counter()
            out = model.generate(
                **prompt,
                **way,
                do_sample=False,
                max_new_tokens=arguments.max_new_tokens,
                return_dict_in_generate=way["decoding"] == "jacobi",
            )
            spent = time.perf_counter() - start
            text = out.sequences if way["decoding"] == "jacobi" else out
            expected = text if expected is None else expected
            if number < arguments.warm_up:
                continue
            seconds[name] += spent
            tokens[name] += text.shape[1] - prompt["input_ids"].shape[1]
            forwards[name] += out.jacobi_stats.forwards if way["decoding"] == "jacobi" else 0
            same[name] += torch.equal(text, expected)
    print("| way | tokens/s | over AR | over compiled AR | tokens per forward | same text |")
    print("| --- | --- | --- | --- | --- | --- |")
    speed = {name: tokens[name] / seconds[name] for name in chosen}
    for name in chosen:
        per_forward = f"{tokens[name] / forwards[name]:.2f}" if forwards[name] else "1"
        print(
            f"| {name} | {speed[name]:.0f} | {speed[name] / speed['ar']:.2f}x "
            f"| {speed[name] / speed['ar, compiled']:.2f}x | {per_forward} | {same[name]} of {arguments.prompts} |"
        )


if __name__ == "__main__":
    main()
