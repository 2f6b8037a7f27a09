"""`hf-jacobi eval`: tasks of lm-evaluation-harness, with tokens per forward beside the scores."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from pathlib import Path

from ..decoding.errors import MissingFile, MissingPackage, UsageError, of_usage
from .models import MODEL, find, reading, settings_beside
from .options import add_dtype, check_places, named, path, positive, write_json


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Score a model on tasks of lm-evaluation-harness by Jacobi decoding, with tokens per forward"
    parser = commands.add_parser("eval", help=about, description=about)
    parser.add_argument("model", nargs="?", help=MODEL)
    parser.add_argument("--tasks", required=True, help="names of tasks with commas between, such as gsm8k,humaneval")
    parser.add_argument("--include_path", type=path, help="a folder with tasks of your own")
    parser.add_argument("--gen_kwargs", default="", help="such as decoding=jacobi,block_size=32, or decoding=ar")
    parser.add_argument("--num_fewshot", type=int, help="worked examples before each question")
    parser.add_argument("--limit", type=positive, help="only so many questions of each task")
    parser.add_argument("--batch_size", type=positive, default=1, help="questions answered together (default: 1)")
    parser.add_argument("--apply_chat_template", action="store_true", help="put questions as a user's message")
    parser.add_argument("--adapter", help="an adapter for it, a folder or a Hub id")
    parser.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="run the code that a model writes, as HumanEval does"
    )
    add_dtype(parser)
    parser.add_argument("--output", type=path, help="write scores, texts and tokens per forward to this JSON file")
    parser.add_argument(
        "--evaluation",
        type=path,
        help="write what `hf-jacobi push` puts into the model card to this JSON file, such as MODEL/evaluation.json",
    )
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        raise MissingPackage(f"this needs {error.name}: pip install 'hf_jacobi[harness]'") from error
    check_places(arguments.output, None, arguments.evaluation)
    if arguments.confirm_run_unsafe_code:
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise UsageError(
                "programs that a model wrote will run here: set HF_ALLOW_CODE_EVAL=1 as well, if they may."
            )
        import lm_eval.tasks.humaneval.utils  # noqa: F401  loads the metric now rather than after all the work
    found = find(arguments.model, arguments.adapter)
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table, simple_parse_args_string

    from ..decoding.mixin import unwrap
    from ..evaluation.lm_eval import JacobiLM, check_gen_kwargs

    with of_usage(ValueError):
        given = simple_parse_args_string(arguments.gen_kwargs)
    check_gen_kwargs(given)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    manager = tasks_of(names, arguments.include_path)
    dtype = "float32" if found.is_demo and arguments.dtype == "auto" else arguments.dtype
    place = {"tokenizer": found.tokenizer_place, "peft": found.adapter and str(found.adapter)}
    found.tokenizer()
    with reading(found.base):
        model = JacobiLM(found.base, **place, dtype=dtype, batch_size=arguments.batch_size)
    if found.adapter is not None:  # which decodes with its own settings, not with those of the model it is for
        unwrap(model.model).generation_config.jacobi = settings_beside(found.adapter)["config"].to_dict()
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
        print(file=sys.stderr)  # what is said of it does not go on in the line of a progress bar
        raise
    if results is None:  # another process of several has them
        return 0
    stats = model.stats
    print(make_table(results))
    print(f"{stats.new_tokens} tokens in {stats.forwards} forwards: {stats.tokens_per_forward:.2f} tokens per forward")
    if arguments.output:
        kept = {name: results[name] for name in ("results", "samples", "n-shot", "configs")}
        kept["tokens_per_forward"] = stats.tokens_per_forward
        kept |= {"new_tokens": stats.new_tokens, "forwards": stats.forwards}
        write_json(arguments.output, kept | {"configs": names_only(kept["configs"])})
    if arguments.evaluation:
        _write_evaluation(arguments, found, model, results, given)
    return 0


def names_only(value):
    """A value with each path in it, of a file or a folder that is there, shortened to its name."""
    if isinstance(value, dict):
        return {key: names_only(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [names_only(one) for one in value]
    is_path = isinstance(value, str) and os.sep in value and len(value) < 1024 and os.path.exists(value)
    return Path(value).name if is_path else value


def tasks_of(names: list[str], folder: Path | None):
    """
    lm-eval's `TaskManager`, with the tasks of these names loaded.

    Raises:
        `UsageError`: there is no such task or folder, or its data cannot be had.
    """
    if not names:
        raise UsageError("--tasks names no task: give one, such as gsm8k.")
    if folder is not None and not folder.is_dir():
        raise MissingFile(f"there is no folder {folder}: name the one with your tasks with --include_path.")
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
    manager.load = lambda tasks: loaded  # once is enough
    return manager


def _write_evaluation(arguments, found, model, results: dict, given: dict) -> None:
    """What was measured, as `publish` takes it: with the settings that the texts were decoded with."""
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
