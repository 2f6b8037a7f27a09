"""`hf-jacobi eval`: tasks of lm-evaluation-harness, with tokens per forward beside the scores."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..decoding.errors import MissingPackage, UsageError
from .demo_model import DEMO_MODEL, demo_checkpoint
from .options import add_dtype, check_places, positive


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Score a model on tasks of lm-evaluation-harness by Jacobi decoding, with tokens per forward"
    parser = commands.add_parser("eval", help=about, description=about)
    parser.add_argument("model", nargs="?", help=f"a local folder or a Hub id (default: {DEMO_MODEL})")
    parser.add_argument("--tasks", required=True, help="names of tasks with commas between, such as gsm8k,humaneval")
    parser.add_argument("--include_path", help="a folder with tasks of your own")
    parser.add_argument("--gen_kwargs", default="", help="such as decoding=jacobi,block_size=32, or decoding=ar")
    parser.add_argument("--num_fewshot", type=int, help="worked examples before each question")
    parser.add_argument("--limit", type=positive, help="only so many questions of each task")
    parser.add_argument("--batch_size", type=positive, default=1, help="questions answered together (default: 1)")
    parser.add_argument("--apply_chat_template", action="store_true", help="put questions as a user's message")
    parser.add_argument("--adapter", help="the folder or the Hub id of a PEFT adapter")
    parser.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="run the code that a model writes, as HumanEval does"
    )
    add_dtype(parser)
    parser.add_argument("--output", type=Path, help="write scores, texts and tokens per forward to this JSON file")
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    try:
        from lm_eval import simple_evaluate
    except ModuleNotFoundError as error:
        raise MissingPackage(f"this needs {error.name}: pip install 'hf_jacobi[harness]'") from error
    check_places(arguments.output)
    if arguments.confirm_run_unsafe_code:
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise UsageError(
                "programs that a model wrote will run here: set HF_ALLOW_CODE_EVAL=1 as well, if they may."
            )
        import lm_eval.tasks.humaneval.utils  # noqa: F401  loads the metric now rather than after all the work
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from ..evaluation.lm_eval import TASKS, JacobiLM

    model = JacobiLM(
        arguments.model or str(demo_checkpoint()),
        peft=arguments.adapter,
        dtype="float32" if arguments.model is None and arguments.dtype == "auto" else arguments.dtype,
        batch_size=arguments.batch_size,
    )
    results = simple_evaluate(
        model=model,
        tasks=arguments.tasks.split(","),
        task_manager=TaskManager(
            include_path=[str(TASKS), *([arguments.include_path] * bool(arguments.include_path))]
        ),
        gen_kwargs=arguments.gen_kwargs or None,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        confirm_run_unsafe_code=arguments.confirm_run_unsafe_code,
        bootstrap_iters=0,
    )
    stats = model.stats
    print(make_table(results))
    print(f"{stats.new_tokens} tokens in {stats.forwards} forwards: {stats.tokens_per_forward:.2f} tokens per forward")
    if arguments.output:
        kept = {name: results[name] for name in ("results", "samples", "n-shot", "configs")}
        kept["tokens_per_forward"] = stats.tokens_per_forward
        kept |= {"new_tokens": stats.new_tokens, "forwards": stats.forwards}
        arguments.output.write_text(json.dumps(kept, indent=1, default=str) + "\n")
    return 0
