"""`hf-jacobi eval` runs tasks of lm-evaluation-harness, and reports scores and tokens per forward."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decoding.errors import MissingFile, MissingPackage, UsageError, of_usage
from .models import MODEL, Found, find, reading, settings_beside
from .options import add_dtype, check_places, named, path, positive, write_json


if TYPE_CHECKING:
    from ..decoding import JacobiStats
    from ..evaluation.lm_eval import JacobiLM


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Score a model on tasks of lm-evaluation-harness with Jacobi decoding, and count its tokens per forward"
    parser = commands.add_parser("eval", help=about, description=about)
    parser.add_argument("model", nargs="?", help=MODEL)
    parser.add_argument("--tasks", required=True, help="comma-separated names of tasks, such as gsm8k,humaneval")
    parser.add_argument("--include_path", type=path, help="a folder with your own tasks")
    parser.add_argument("--gen_kwargs", default="", help="such as decoding=jacobi,block_size=32, or decoding=ar")
    parser.add_argument("--num_fewshot", type=int, help="worked examples before each question")
    parser.add_argument("--limit", type=positive, help="maximum questions per task")
    parser.add_argument("--batch_size", type=positive, default=1, help="questions answered together (default: 1)")
    parser.add_argument("--apply_chat_template", action="store_true", help="ask each question as a user's message")
    parser.add_argument("--adapter", help="an adapter for MODEL, a folder or a Hub id")
    parser.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="run the code that a model writes, as HumanEval does"
    )
    add_dtype(parser)
    parser.add_argument("--output", type=path, help="write scores, texts and tokens per forward to this JSON file")
    parser.add_argument(
        "--evaluation",
        type=path,
        help="write the figures for the model card to this JSON file, such as MODEL/evaluation.json",
    )
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    import lm_eval

    check_places(arguments.output, None, arguments.evaluation)
    if arguments.confirm_run_unsafe_code:
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise UsageError(
                "--confirm_run_unsafe_code runs programs that a model wrote: to allow that, set HF_ALLOW_CODE_EVAL=1 "
                "as well."
            )
        import lm_eval.tasks.humaneval.utils  # noqa: F401 -- loads the metric before all other work
    found = find(arguments.model, arguments.adapter)
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table, simple_parse_args_string

    from ..evaluation.lm_eval import check_gen_kwargs

    with of_usage(ValueError):
        given = simple_parse_args_string(arguments.gen_kwargs)
    check_gen_kwargs(given)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    manager = tasks_of(names, arguments.include_path)
    model = _load(found, arguments)
    try:
        results = simple_evaluate(
            model=model,
            tasks=names,
            task_manager=manager,
            gen_kwargs=arguments.gen_kwargs or None,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            apply_chat_template=arguments.apply_chat_template,
            confirm_run_unsafe_code=arguments.confirm_run_unsafe_code,
            bootstrap_iters=0,
        )
    except BaseException:
        print(file=sys.stderr)  # ends the line of a progress bar before the error is printed
        raise
    if results is None:  # with several processes, only one has the results
        return 0
    stats = model.stats
    print(make_table(results))
    print(f"{stats.new_tokens} tokens in {stats.forwards} forwards: {stats.tokens_per_forward:.2f} tokens per forward")
    if arguments.output:
        _write_results(arguments.output, results, stats)
    if arguments.evaluation:
        _write_evaluation(arguments, found, model, results, given)
    return 0


def _load(found: Found, arguments) -> JacobiLM:
    from ..decoding.mixin import unwrap
    from ..decoding.ngram_table import loaded_from
    from ..evaluation.lm_eval import JacobiLM

    dtype = "float32" if found.is_demo and arguments.dtype == "auto" else arguments.dtype
    place = {"tokenizer": found.tokenizer_place, "peft": found.adapter and str(found.adapter)}
    found.tokenizer()
    with reading(found.base):
        model = JacobiLM(found.base, **place, dtype=dtype, batch_size=arguments.batch_size)
    if found.adapter is not None:  # it has its own settings, which replace those of its base model
        config = settings_beside(found.adapter)["config"]
        loaded_from(unwrap(model.model), found.adapter)
        vars(unwrap(model.model).generation_config)["jacobi"] = config.to_dict()
    return model


def _write_results(file: Path, results: dict[str, Any], stats: JacobiStats) -> None:
    kept = {name: results[name] for name in ("results", "samples", "n-shot", "configs")}
    kept["tokens_per_forward"] = stats.tokens_per_forward
    kept |= {"new_tokens": stats.new_tokens, "forwards": stats.forwards}
    write_json(file, kept | {"configs": names_only(kept["configs"])})


def names_only(value):
    """A value in which each path of an existing file or folder is shortened to its name."""
    if isinstance(value, dict):
        return {key: names_only(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [names_only(one) for one in value]
    is_path = isinstance(value, str) and os.sep in value and len(value) < 1024 and os.path.exists(value)
    return Path(value).name if is_path else value


def tasks_of(names: list[str], folder: Path | None):
    """
    lm-eval's `TaskManager`, with these tasks loaded.

    Raises:
        `UsageError`: there is no such task or folder, or its data cannot be loaded.
    """
    if not names:
        raise UsageError("--tasks names no task: give one, such as gsm8k.")
    if folder is not None and not folder.is_dir():
        raise MissingFile(f"there is no folder {folder}: name the folder of your tasks with --include_path.")
    from lm_eval.tasks import TaskManager
    from yaml import YAMLError

    from ..evaluation.lm_eval import TASKS

    with of_usage(YAMLError):
        manager = TaskManager(include_path=[str(TASKS), *([str(folder)] if folder else [])])
    unknown = [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]
    if unknown:
        near = [near for name in unknown for near in difflib.get_close_matches(name, manager.all_tasks, 3)]
        hint = f" (near: {', '.join(near)})" if near else ""
        raise UsageError(f"there is no task {', '.join(unknown)}{hint}: `lm_eval ls tasks` lists them.")
    try:
        with of_usage(OSError, ValueError, YAMLError):
            loaded = manager.load(names)
    except ImportError as error:
        raise MissingPackage(f"{', '.join(names)}: {error}") from error
    manager.load = lambda tasks: loaded  # so that they are not loaded again
    return manager


def _write_evaluation(arguments, found: Found, model: JacobiLM, results: dict, given: dict) -> None:
    """Writes the evaluation for `publish`, with the settings that the texts were decoded with."""
    from ..decoding import JacobiConfig
    from ..decoding.mixin import unwrap
    from ..evaluation.bench import described, setup_of
    from ..evaluation.lm_eval import SETTINGS, evaluation_of
    from ..hub.card import checked

    own = JacobiConfig.coerce(getattr(unwrap(model.model).generation_config, "jacobi", None))
    changes = {name: value for name, value in given.items() if name in SETTINGS}
    config = dataclasses.replace(own, **changes)
    settings = {"decoding": given.get("decoding", "jacobi"), "jacobi": config.to_dict()}
    questions = f"{arguments.limit} questions of each task" if arguments.limit else "all questions"
    others = {name: value for name, value in given.items() if name not in (*SETTINGS, "decoding")}
    if arguments.num_fewshot is not None:
        others["num_fewshot"] = arguments.num_fewshot
    setup = f"{described(setup_of(model.model))}; batches of {arguments.batch_size}, {questions}"
    setup += f"; {named(others)}" if others else ""
    name = found.adapter_name or found.name
    write_json(arguments.evaluation, checked(evaluation_of(results, model.stats, name, settings, setup)))
