"""`hf-jacobi train`: Jacobi Forcing from the shell."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..decoding.errors import MissingPackage, UsageError, of_usage
from ..decoding.files import read_yaml
from .options import check_folder
from .train_options import check


ABOUT = "Train a model to decode in parallel (Jacobi Forcing), whole or with an adapter"


@dataclass
class DataArguments:
    """The data; see `hf-jacobi pack`."""

    train_dataset: str = field(metadata={"help": "what `hf-jacobi pack` wrote, or a data set like it"})
    eval_dataset: str | None = field(default=None, metadata={"help": "the same for evaluation"})
    eval_rows: int = field(
        default=0, metadata={"help": "without an eval_dataset: hold back this many rows of train_dataset"}
    )
    eval_score: str | None = field(
        default=None,
        metadata={
            "help": "module:function or file.py:function that says of a prompt and its text whether it is right"
        },
    )


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    parser = commands.add_parser("train", help=ABOUT, description=ABOUT, add_help=False)
    parser.set_defaults(run=run)


def with_config_checked(typed: list[str]) -> list[str]:
    """
    The options with `--config FILE` as TRL reads it, once the file is known to be one that it can read.

    Raises:
        `UsageError`: there is no such file, it is no YAML, or holds something else than names and values.
    """
    typed = [part for one in typed for part in (one.split("=", 1) if one.startswith("--config=") else [one])]
    if "--config" not in typed:
        return typed
    place = typed.index("--config") + 1
    if typed.count("--config") > 1:
        raise UsageError("--config is there twice: give one file.")
    if place == len(typed) or typed[place].startswith("--") or not typed[place].strip():
        raise UsageError("--config names no file: name the YAML file with the options.")
    file = Path(typed[place]).expanduser()
    read_yaml(file, "options")
    return [*typed[:place], str(file), *typed[place + 1 :]]


def run(arguments) -> int:
    """Runs the command."""
    check(arguments.rest, ABOUT)
    try:
        from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config
    except ModuleNotFoundError as error:
        raise MissingPackage(f"this needs {error.name}: pip install 'hf_jacobi[train]'") from error

    from ..training import JacobiForcingConfig, JacobiForcingTrainer
    from ..training.figures import score_function
    from ..trajectories.prompts import open_prompts

    parser = TrlParser((DataArguments, JacobiForcingConfig, ModelConfig), prog="hf-jacobi train")
    typed = with_config_checked(arguments.rest)
    with of_usage(ValueError, OSError):
        data, training, model = parser.parse_args_and_config(args=typed)
    if not (model.model_name_or_path or "").strip():
        raise UsageError("name the model: --model_name_or_path, a folder or a Hub id.")
    settings = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    if (quantization := get_quantization_config(model)) is not None:
        settings |= {"quantization_config": quantization, "device_map": {"": training.device.index or 0}}
    training.model_init_kwargs = {name: value for name, value in settings.items() if value is not None} | (
        training.model_init_kwargs or {}
    )
    score = None if data.eval_score is None else score_function(data.eval_score)
    if data.eval_rows < 0:
        raise UsageError(f"eval_rows={data.eval_rows}: a number of rows is at least 0.")
    if training.output_dir is not None:
        check_folder(Path(training.output_dir))
    train = open_prompts(data.train_dataset)
    held_out = None
    if data.eval_dataset is not None:
        held_out = open_prompts(data.eval_dataset)
    elif data.eval_rows:
        if data.eval_rows >= len(train):
            raise UsageError(f"eval_rows={data.eval_rows} leaves nothing of {len(train)} rows to train on.")
        split = train.train_test_split(test_size=data.eval_rows, seed=training.seed)
        train, held_out = split["train"], split["test"]
    trainer = JacobiForcingTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=get_peft_config(model),
        eval_score=score,
    )
    last = str(training.resume_from_checkpoint).lower() == "true"  # the option, unlike YAML, gives text
    trainer.train(resume_from_checkpoint=last or training.resume_from_checkpoint)
    trainer.save_model()
    if held_out is not None:
        trainer.evaluate()
        trainer.create_model_card()  # with the figures
    trainer.accelerator.print(f"written to {training.output_dir}")
    if training.push_to_hub:
        local = Path(data.train_dataset).expanduser().exists()
        trainer.push_to_hub(dataset_name=None if local else data.train_dataset)
    trainer.accelerator.state.destroy_process_group()
    return 0
