"""`hf-jacobi bench` compares decoding methods on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..decoding.errors import UsageError
from .models import MODEL, Adapted, Found, find
from .options import (
    Prompts,
    add_dtype,
    add_prompts,
    check_places,
    named,
    path,
    positive,
    settings,
    wrapped,
    write_json,
    write_picture,
)


if TYPE_CHECKING:
    from ..evaluation.measuring import Method


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Compare the speed, memory and texts of AR, prompt lookup and Jacobi decoding in one run"
    parser = commands.add_parser("bench", help=about, description=about)
    parser.add_argument("model", nargs="?", help=MODEL)
    parser.add_argument("--adapter", help="an adapter for MODEL, a folder or a Hub id; AR runs without PEFT's layers")
    add_prompts(parser, count=16)
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1], help="rows per batch (default: 1)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="maximum tokens per text (default: 128)")
    parser.add_argument(
        "--repeats", type=positive, default=1, help="how many times each batch is decoded (default: 1)"
    )
    parser.add_argument(
        "--config",
        type=settings,
        action="append",
        help="JacobiConfig settings as JSON, in place of the default ones; repeatable",
    )
    add_dtype(parser)
    parser.add_argument("--attention", help="attention implementation, such as sdpa or eager")
    parser.add_argument("--compile", action="store_true", help="compile the model's forward with torch.compile")
    parser.add_argument("--output", type=path, help="write the figures to this JSON file")
    parser.add_argument(
        "--evaluation",
        type=path,
        help="write the figures for the model card to this JSON file, such as MODEL/evaluation.json",
    )
    parser.add_argument("--plot", type=path, help="plot the figures into this PNG file (needs matplotlib)")
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    if arguments.evaluation and arguments.config:
        raise UsageError(
            "--evaluation measures the checkpoint's own settings: drop --config, or set them with `hf-jacobi tune`."
        )
    given = [named(config) for config in arguments.config or []]
    if len(set(given)) < len(given):
        raise UsageError(f"--config appears twice with {max(given, key=given.count)}: give it once.")
    check_places(arguments.output, arguments.plot, arguments.evaluation)
    prompts = Prompts(arguments)
    found = find(arguments.model, arguments.adapter)
    tokenizer = found.tokenizer()
    ids = prompts.encode(tokenizer)

    from tqdm import tqdm

    from ..decoding import enable
    from ..evaluation.bench import bench, check_prompts, table

    check_prompts(ids, arguments.batch_sizes)
    loaded = found.load(arguments.dtype, attention=arguments.attention)
    for one in {id(loaded.writer): loaded.writer, id(loaded.model): loaded.model}.values():
        enable(one)
        if arguments.compile:
            _compile(one)
    methods, own = _methods(arguments, found, loaded)
    report = bench(
        loaded.model,
        tokenizer,
        ids,
        methods,
        batch_sizes=arguments.batch_sizes,
        max_new_tokens=arguments.max_new_tokens,
        repeats=arguments.repeats,
        base=loaded.writer,
        progress=lambda runs, total: tqdm(runs, total=total, unit=" batches", leave=False),
    )
    report["setup"] |= {"model": found.name, "compile": arguments.compile, "adapter": found.adapter_name}
    print(wrapped(", ".join(f"{name} {value}" for name, value in report["setup"].items() if value)), end="")
    print(f"\n{table(report)}")
    if arguments.output:
        write_json(arguments.output, report)
    if arguments.evaluation:
        _write_evaluation(arguments.evaluation, report, found, loaded, prompts.name, own)
    if arguments.plot:
        from ..evaluation.plots import bench_bars

        write_picture(arguments.plot, bench_bars(report))
    return 0


def _compile(model) -> None:
    import torch

    from ..decoding.mixin import unwrap

    inner = unwrap(model)  # whose forward PEFT's `generate` calls
    inner.forward = torch.compile(inner.forward, dynamic=True)


def _methods(arguments, found: Found, loaded: Adapted) -> tuple[list[Method], str]:
    """The decoding methods that are compared, and the name of the one with the checkpoint's own settings."""
    from ..evaluation.bench import DEFAULT, OWN, methods_of
    from ..evaluation.measuring import Method

    methods = list(methods_of(loaded.model))
    own = OWN if loaded.tuned else DEFAULT.name
    if found.adapter is not None:  # it has its own settings, which replace those of its base model
        own = "Jacobi, the adapter's"
        methods = [method for method in methods if method.name != OWN]
        first = next(index for index, method in enumerate(methods) if method.decoding == "jacobi")
        methods.insert(first, Method(own, "jacobi", loaded.config.to_dict()))
    if arguments.config:
        chosen = (Method(f"Jacobi, {named(config)}", "jacobi", config) for config in arguments.config)
        methods = [*(method for method in methods if method.decoding != "jacobi"), *chosen]
    return methods, own


def _write_evaluation(file: Path, report: dict, found: Found, loaded: Adapted, dataset: str, own: str) -> None:
    from ..evaluation.bench import evaluation_of
    from ..hub.card import checked

    evaluation = evaluation_of(report, found.adapter_name or found.name, dataset, loaded.settings, own)
    write_json(file, checked(evaluation))
