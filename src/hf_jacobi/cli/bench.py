"""`hf-jacobi bench`: ways of decoding side by side on this machine."""

from __future__ import annotations

import json
from pathlib import Path

from .demo_model import DEMO_MODEL
from .models import load, with_adapter
from .options import add_dtype, add_prompts, check_places, named, positive, prompts_of, settings, wrapped


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = (
        "Measure AR, prompt lookup and Jacobi decoding in one run: tokens per forward, time, memory, same text or not"
    )
    parser = commands.add_parser("bench", help=about, description=about)
    parser.add_argument("model", nargs="?", help=f"a local folder or a Hub id (default: {DEMO_MODEL})")
    parser.add_argument(
        "--adapter", type=Path, help="the folder of an adapter for it; AR runs without it if it only drafts"
    )
    add_prompts(parser, count=16)
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1], help="rows together (default: 1)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="length of the texts (default: 128)")
    parser.add_argument("--repeats", type=positive, default=1, help="how often each batch is decoded (default: 1)")
    parser.add_argument(
        "--config", type=settings, action="append", help="settings of JacobiConfig as JSON instead; repeatable"
    )
    add_dtype(parser)
    parser.add_argument("--attention", help="attention implementation, such as sdpa or eager")
    parser.add_argument("--compile", action="store_true", help="compile the model's forward with torch.compile")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG file (needs matplotlib)")
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    import torch
    from tqdm import tqdm

    check_places(arguments.output, arguments.plot)
    from ..decoding import enable
    from ..decoding.mixin import unwrap
    from ..evaluation.bench import bench, methods_of, table
    from ..evaluation.measuring import Method

    base, tokenizer = load(arguments.model, arguments.dtype, attention=arguments.attention)
    model, base, own = with_adapter(base, arguments.adapter) if arguments.adapter else (base, base, None)
    prompts = prompts_of(arguments, tokenizer)
    for one in {id(base): base, id(model): model}.values():
        enable(one)
        if arguments.compile:
            inner = unwrap(one)  # PEFT's `generate` calls this one
            inner.forward = torch.compile(inner.forward, dynamic=True)
    methods = list(methods_of(model))
    if own is not None:
        first = next(index for index, method in enumerate(methods) if method.decoding == "jacobi")
        methods.insert(first, Method("Jacobi, the adapter's", "jacobi", own.to_dict()))
    if arguments.config:
        asked = (Method(f"Jacobi, {named(config)}", "jacobi", config) for config in arguments.config)
        methods = [*(method for method in methods if method.decoding != "jacobi"), *asked]
    report = bench(
        model,
        tokenizer,
        prompts,
        methods,
        batch_sizes=arguments.batch_sizes,
        max_new_tokens=arguments.max_new_tokens,
        repeats=arguments.repeats,
        base=base,
        progress=lambda runs, total: tqdm(runs, total=total, unit=" batches", leave=False),
    )
    report["setup"] |= {"model": arguments.model or DEMO_MODEL, "compile": arguments.compile}
    report["setup"] |= {"adapter": arguments.adapter and arguments.adapter.name}
    print(wrapped(", ".join(f"{name} {value}" for name, value in report["setup"].items() if value)), end="")
    print(f"\n{table(report)}")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        from ..evaluation.plots import bench_bars

        bench_bars(report).figure.savefig(arguments.plot, dpi=120, bbox_inches="tight")
    return 0
