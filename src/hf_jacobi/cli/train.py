"""`hf-jacobi train` trains a model with Jacobi Forcing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decoding.errors import UsageError, of_usage
from ..decoding.files import read_yaml
from .options import check_folder
from .train_options import check


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BitsAndBytesConfig
    from trl import ModelConfig

    from ..training import JacobiForcingConfig


ABOUT = "Train a model, or an adapter for it, to decode in parallel (Jacobi Forcing)"


@dataclass
class DataArguments:
    """The data; see `hf-jacobi pack`."""

    train_dataset: str = field(metadata={"help": "the output of `hf-jacobi pack`, or a data set of the same form"})
    eval_dataset: str | None = field(default=None, metadata={"help": "a data set of the same form for evaluation"})
    eval_rows: int = field(
        default=0, metadata={"help": "without an eval_dataset: evaluate on this many rows of train_dataset instead"}
    )
    eval_score: str | None = field(
        default=None,
        metadata={
            "help": "module:function or file.py:function of a prompt and its completion: whether the answer is correct"
        },
    )


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    parser = commands.add_parser("train", help=ABOUT, description=ABOUT, add_help=False)
    parser.set_defaults(run=run)


def with_config_checked(typed: list[str]) -> list[str]:
    """
    Checks the file of `--config`, and returns the options in the form that TRL reads.

    Raises:
        `UsageError`: the file does not exist, is not YAML, or holds something other than names and values.
    """
    typed = [part for one in typed for part in (one.split("=", 1) if one.startswith("--config=") else [one])]
    if "--config" not in typed:
        return typed
    place = typed.index("--config") + 1
    if typed.count("--config") > 1:
        raise UsageError("--config appears twice: give one file.")
    if place == len(typed) or typed[place].startswith("--") or not typed[place].strip():
        raise UsageError("--config names no file: name the YAML file with the options.")
    file = Path(typed[place]).expanduser()
    read_yaml(file, "options")
    return [*typed[:place], str(file), *typed[place + 1 :]]


def run(arguments) -> int:
    """Runs the command."""
    check(arguments.rest, ABOUT)

    from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

    from ..training import JacobiForcingConfig, JacobiForcingTrainer
    from ..training.figures import score_function

    kinds: list[Any] = [DataArguments, JacobiForcingConfig, ModelConfig]
    parser = TrlParser(kinds, prog="hf-jacobi train")
    typed = with_config_checked(arguments.rest)
    with of_usage(ValueError, OSError):
        data, training, model = parser.parse_args_and_config(args=typed)
    if not (model.model_name_or_path or "").strip():
        raise UsageError("name the model: --model_name_or_path, a folder or a Hub id.")
    settings = _model_settings(model, get_quantization_config(model), training)
    training.model_init_kwargs = settings | (training.model_init_kwargs or {})
    score = None if data.eval_score is None else score_function(data.eval_score)
    if data.eval_rows < 0:
        raise UsageError(f"eval_rows={data.eval_rows}: the number of rows must be at least 0.")
    if training.output_dir is not None:
        check_folder(Path(training.output_dir))
    train, held_out = _open(data, training.seed)
    trainer = JacobiForcingTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=get_peft_config(model),
        eval_score=score,
    )
    last = str(training.resume_from_checkpoint).lower() == "true"  # text from an option, a boolean from YAML
    trained = trainer.train(resume_from_checkpoint=last or training.resume_from_checkpoint)
    trainer.save_model()
    figures: dict[str, float] = {}
    if held_out is not None:
        figures = trainer.evaluate()
        trainer.create_model_card()  # with the figures of the evaluation
    trainer.accelerator.print(summary(trained.training_loss, figures, str(training.output_dir)))
    if training.push_to_hub:
        local = Path(data.train_dataset).expanduser().exists()
        trainer.push_to_hub(dataset_name=None if local else data.train_dataset)
    trainer.accelerator.state.destroy_process_group()
    return 0


def summary(loss: float, figures: Mapping[str, float], folder: str) -> str:
    """
    The end of the output: the figures, and what to do next.

    Args:
        loss: the mean training loss.
        figures: what `evaluate` returned; empty without an evaluation.
        folder: where the checkpoint is.
    """
    lines = [f"\ntraining loss {loss:.4g}"]
    shown = {
        "loss": "loss {:.4g}",
        "tokens_per_forward": "tokens per forward {:.2f}",
        "agreement": "agreement with the text before training {:.1%}",
        "score": "score {:.1%}",
    }
    if found := [text.format(figures[f"eval_{name}"]) for name, text in shown.items() if f"eval_{name}" in figures]:
        lines.append(f"evaluation: {', '.join(found)}")
    name = shlex.quote(folder)
    lines += [
        f"written to {folder}",
        f"Next: `hf-jacobi tune {name}` finds its fastest settings on this machine, and `hf-jacobi bench {name}` "
        "compares it with AR.",
    ]
    return "\n".join(lines)


def _model_settings(
    model: ModelConfig, quantization: BitsAndBytesConfig | None, training: JacobiForcingConfig
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that the options set."""
    settings: dict[str, Any] = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    if quantization is not None:
        settings |= {"quantization_config": quantization, "device_map": {"": training.device.index or 0}}
    return {name: value for name, value in settings.items() if value is not None}


def _open(data: DataArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """The rows for training and for evaluation."""
    from ..trajectories.prompts import open_prompts

    train: Dataset = open_prompts(data.train_dataset)
    if data.eval_dataset is not None:
        return train, open_prompts(data.eval_dataset)
    if not data.eval_rows:
        return train, None
    if data.eval_rows >= len(train):
        raise UsageError(f"eval_rows={data.eval_rows} leaves none of {len(train)} rows for training: lower it.")
    split = train.train_test_split(test_size=data.eval_rows, seed=seed)
    return split["train"], split["test"]
