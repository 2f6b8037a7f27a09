"""
Jacobi drafts in vLLM compared with vLLM's own AR and n-gram drafts: tokens per forward, tokens per second, identity.

    python -m benchmarks.vllm speed                  # the miniature, one request at a time and 8 in flight
    python -m benchmarks.vllm speed --model ~/.cache/hf_jacobi/smollm2-135m-instruct    # a model not trained for it
    python -m benchmarks.vllm lengths --in-flight 1 4 8 16 32    # by draft length: what to put into draft_lengths
    python -m benchmarks.vllm steps                  # forwards in vLLM and in generate(window="sliding")

Put `scripts/test-with-vllm --run` before the command: it makes the environment and uses one thread. All methods are
loaded at once and take turns, so that a machine that slows down affects all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from hf_jacobi.cli.models import MINIATURE
from hf_jacobi.decoding.config import JacobiConfig
from hf_jacobi.evaluation.prompts import CHAT
from hf_jacobi.serving.vllm import tokens_per_forward

from .miniature.tasks import held_out_problems


JACOBI = "hf_jacobi.serving.vllm.JacobiProposer"
DRAFTED = 15


def jacobi(length: int = DRAFTED, **settings) -> dict:
    """Arguments of `LLM` for Jacobi drafts of `length` tokens, whatever the number of requests."""
    return {
        "speculative_config": {"method": "custom_class", "model": JACOBI, "num_speculative_tokens": length},
        "additional_config": {"jacobi": {"draft_lengths": {1: length}} | settings},
        "worker_extension_cls": "hf_jacobi.serving.vllm.JacobiWorker",
    }


def ngram(length: int, shortest: int) -> dict:
    """Arguments of `LLM` for vLLM's own n-gram drafts."""
    lookup = {"prompt_lookup_min": shortest, "prompt_lookup_max": 4}
    return {"speculative_config": {"method": "ngram", "num_speculative_tokens": length} | lookup}


@dataclass
class Engine:
    """One way of serving the model, and its measurements."""

    name: str
    arguments: dict
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    texts: list = field(default_factory=list)

    def start(self, model: str, longest: int) -> None:
        from vllm import LLM

        self.llm = LLM(model, dtype="float32", max_model_len=longest, max_num_seqs=64, seed=0, **self.arguments)
        self.sampling = None

    def write(self, prompts: list[str], new_tokens: int) -> list[list[int]]:
        """The texts of all prompts, in flight together."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=new_tokens)
        return [out.outputs[0].token_ids for out in self.llm.generate(prompts, sampling, use_tqdm=False)]

    def stats(self) -> dict[str, float]:
        """Counts of its drafts, for Jacobi drafts."""
        return self.llm.collective_rpc("jacobi_stats")[0] if "worker_extension_cls" in self.arguments else {}


def prompts_of(model: str, count: int) -> list[str]:
    """Prompts that suit a model: held-out problems for the miniature, questions for others."""
    if Path(model).resolve() == MINIATURE:
        return [problem.prompt for problem in held_out_problems(-(-count // 2))][:count]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in CHAT[:count]
    ]


def race(engines: list[Engine], prompts: list[str], in_flight: int, new_tokens: int) -> dict[str, dict]:
    """
    Lets the engines complete all prompts in turn, `in_flight` at a time.

    Returns:
        Figures by name of engine; speed-ups are over the first one, the median over the portions.
    """
    portions = [prompts[start : start + in_flight] for start in range(0, len(prompts), in_flight)]
    for engine in engines:
        engine.write(portions[0], 8)
    before = [engine.stats() for engine in engines]
    for engine in engines:
        engine.seconds, engine.texts = [], []
    for number, portion in enumerate(portions):
        for engine in engines[number % len(engines) :] + engines[: number % len(engines)]:
            start = time.perf_counter()
            engine.texts += engine.write(portion, new_tokens)
            engine.seconds.append(time.perf_counter() - start)
    first = engines[0]
    figures = {}
    for engine, old in zip(engines, before):
        tokens = sum(map(len, engine.texts))
        figures[engine.name] = {
            "tokens": tokens,
            "tokens_per_second": tokens / sum(engine.seconds),
            "speedup": sum(first.seconds) / sum(engine.seconds),
            "speedup_median": median(ar / own for ar, own in zip(first.seconds, engine.seconds)),
            "identical": sum(list(a) == list(b) for a, b in zip(engine.texts, first.texts)) / len(prompts),
        }
        if stats := engine.stats():
            grown = {name: stats[name] - old[name] for name in ("requests", "drafts")}
            figures[engine.name]["tokens_per_forward"] = tokens_per_forward(tokens, grown)
    return figures


def print_figures(title: str, figures: dict[str, dict]) -> None:
    """A table."""
    print(f"\n{title}\n{'':16}{'tokens/s':>10}{'speed-up':>10}{'median':>10}{'TPF':>8}{'identical':>11}")
    for name, row in figures.items():
        tpf = f"{row['tokens_per_forward']:8.2f}" if "tokens_per_forward" in row else f"{'':8}"
        speed = f"{row['tokens_per_second']:10.1f}{row['speedup']:10.2f}{row['speedup_median']:10.2f}"
        print(f"{name:16}{speed}{tpf}{row['identical']:11.0%}", flush=True)


def speed(arguments) -> dict:
    """AR, n-grams and Jacobi drafts, for each number of requests in flight."""
    engines = [Engine("AR", {}), Engine("n-grams, 5", ngram(5, 2)), Engine(f"n-grams, {DRAFTED}", ngram(DRAFTED, 2))]
    engines += [Engine("Jacobi", jacobi(arguments.draft_length))]
    return _race_all(arguments, engines)


def lengths(arguments) -> dict:
    """AR and Jacobi drafts of several lengths, for each number of requests in flight."""
    engines = [Engine("AR", {}), *(Engine(f"Jacobi, {n}", jacobi(n, **arguments.settings)) for n in arguments.lengths)]
    return _race_all(arguments, engines)


def _race_all(arguments, engines: list[Engine]) -> dict:
    prompts = prompts_of(arguments.model, arguments.prompts)
    for engine in engines:
        engine.start(arguments.model, arguments.longest)
    results = {}
    for in_flight in arguments.in_flight:
        results[in_flight] = race(engines, prompts, in_flight, arguments.new_tokens)
        print_figures(f"{Path(arguments.model).name}, {in_flight} in flight", results[in_flight])
    return results


def steps(arguments) -> dict:
    """Forwards of each text in vLLM and in `generate`, with the same settings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_jacobi

    settings = {"window": "sliding", "adaptive": False, "pool_size": 0, "block_size": DRAFTED + 1}
    # All of them, because vLLM takes missing ones from the checkpoint.
    settings = JacobiConfig(**settings | {"draft_init": "prompt"} | arguments.settings).to_dict()
    prompts = prompts_of(arguments.model, arguments.prompts)
    engine = Engine("Jacobi", jacobi(DRAFTED, **settings))
    engine.start(arguments.model, arguments.longest)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = hf_jacobi.enable(AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32))
    rows = []
    for prompt in prompts:
        before = engine.stats()
        text = list(engine.write([prompt], arguments.new_tokens)[0])
        after = engine.stats()
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=arguments.new_tokens,
            decoding="jacobi",
            jacobi_config=JacobiConfig(**settings),
            return_dict_in_generate=True,
        )
        served = sum(after[name] - before[name] for name in ("requests", "drafts"))
        identical = out.sequences[0, inputs["input_ids"].shape[1] :].tolist() == text
        rows.append({"vllm": served, "generate": out.jacobi_stats.forwards, "identical": identical})
    served, own = (sum(row[name] for row in rows) for name in ("vllm", "generate"))
    print(f"forwards: vLLM {served}, generate {own} ({served / own - 1:+.1%}); texts identical: ", end="")
    print(f"{sum(row['identical'] for row in rows)} of {len(rows)}")
    return {"rows": rows, "vllm": served, "generate": own}


COMMANDS = {"speed": speed, "lengths": lengths, "steps": steps}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.vllm", description=__doc__.strip().splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--model", default=str(MINIATURE), help="folder of a checkpoint (default: the miniature)")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--longest", type=int, default=1024, help="max_model_len")
    parser.add_argument("--draft-length", type=int, default=DRAFTED)
    parser.add_argument("--lengths", type=int, nargs="+", default=[3, 7, 15])
    parser.add_argument("--settings", type=json.loads, default={}, help="of JacobiConfig, as JSON")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    results = COMMANDS[arguments.command](arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
