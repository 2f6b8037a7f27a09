"""The stages of a phase. Each writes files, and is skipped if these are complete."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback

from ..decoding.errors import UsageError, of_usage
from ..decoding.files import read_json, write_whole
from ..decoding.mixin import enable
from ..hub.plain_lora import refuse_changing
from ..training.config import JacobiForcingConfig
from ..training.figures import Score
from ..training.trainer import JacobiForcingTrainer, load_model
from ..trajectories.collect import collect_trajectories, read_report
from ..trajectories.corruption import pack_completions
from ..trajectories.packing import pack_trajectories
from ..trajectories.prompts import name_of_prompt, open_prompts
from ..trajectories.shards import counts_in
from ..trajectories.statistics import PackingStatistics
from .choosing import choose, figures_of, keeps
from .recipe import Phase, Recipe


if TYPE_CHECKING:
    from peft import LoraConfig


CHECKPOINTS = 4  # in a phase without `save_steps`
LOG_STEPS = 10  # at most, between two lines of the log
# Values of a log that depend on the clock or on the process, so they differ from run to run.
OF_CLOCK = ("runtime", "per_second", "train_loss", "total_flos")
LEFT_OUT = ("optimizer*", "*.pth", "scheduler.pt", "scaler.pt", "training_args.bin", "trainer_state.json")


class Place:
    """
    The folders of a recipe.

    Args:
        folder: the output folder of the recipe.
        recipe: the recipe.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder = folder
        self.recipe = recipe

    def of(self, phase: Phase) -> Path:
        """The folder of a phase."""
        return self.folder / phase.name

    def trajectories(self, phase: Phase) -> Path:
        """The folder of its trajectories, which can belong to an earlier phase."""
        while phase.collect is None:
            phase = self.recipe.phases[self.recipe.phases.index(phase) - 1]
        return self.of(phase) / "trajectories"

    def model(self, phase: Phase) -> Path:
        """The folder of the model that it ends with; the last phase's model is the result."""
        is_last = phase is self.recipe.phases[-1]
        return self.folder / "model" if is_last else self.of(phase) / "model"

    def start(self, phase: Phase) -> str:
        """The name or folder of the model that it starts from."""
        number = self.recipe.phases.index(phase)
        return str(self.model(self.recipe.phases[number - 1])) if number else self.recipe.model

    def stages_done(self, phase: Phase) -> list[str]:
        """The stages of a phase that are done, in order."""
        marks = {
            "collect": self.trajectories(phase) / ".done",
            "pack": self.of(phase) / "packed" / ".done",
            "train": self.of(phase) / "log.json",
            "choose": self.of(phase) / "choice.json",
        }
        return [name for name, file in marks.items() if file.exists()]


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content, indent=1) + "\n")


def load(name: str, base: str, dtype: str, device: torch.device):
    """An enabled model in evaluation mode; an adapter is loaded onto `base`."""
    model = AutoModelForCausalLM.from_pretrained(base if is_adapter(name) else name, dtype=dtype)
    return enable(_with_adapter(model, name).eval().to(device))


def _with_adapter(model, name: str, **settings: Any):
    """The model with the adapter in a folder, or the model itself if `name` is not such a folder."""
    if not is_adapter(name):
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, name, **settings)


def is_adapter(name: str) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(name) / "adapter_config.json").exists()


def collect(place: Place, phase: Phase, rows, tokenizer, device, tell) -> None:
    """Collects the trajectories of a phase with the model that it starts from."""
    assert phase.collect is not None  # without `collect`, this stage counts as done
    folder = place.trajectories(phase)
    arguments = dict(phase.collect)
    skip, most = arguments.pop("skip_prompts", 0) or 0, arguments.pop("max_prompts", None)
    dtype = arguments.pop("dtype", "auto")
    rows = some_of(rows, skip, len(rows) if most is None else skip + most)
    model = load(place.start(phase), place.recipe.model, dtype, device)
    collect_trajectories(
        model, tokenizer, rows, block_size=phase.block_size, output_dir=folder, progress=tell, **arguments
    )
    (folder / ".done").touch()


def some_of(rows, first: int, end: int):
    """The rows from `first` up to `end`."""
    chosen = range(min(first, len(rows)), min(end, len(rows)))
    if not chosen:
        raise UsageError(f"skip_prompts={first} skips all {len(rows)} prompts: lower it.")
    return rows.select(chosen) if isinstance(rows, Dataset) else rows[chosen.start : chosen.stop]


def pack(place: Place, phase: Phase, rows, tokenizer, score: Score | None) -> None:
    """Packs the trajectories of a phase."""
    folder = place.of(phase) / "packed"
    trajectories = open_prompts(str(place.trajectories(phase)))
    arguments = dict(phase.pack)
    if arguments.pop("only_right", False):
        assert score is not None  # `read_recipe` refuses `only_right` without `choose.score`
        trajectories = right_ones(trajectories, rows, tokenizer, score)
    if "noise" in arguments:
        pack_completions(trajectories, tokenizer, phase.block_size, output_dir=folder, **arguments)
    else:
        pack_trajectories(trajectories, output_dir=folder, **arguments)
    (folder / ".done").touch()


def right_ones(trajectories: Dataset, rows, tokenizer, score: Score) -> Dataset:
    """The trajectories whose text is a correct answer."""
    asked = {name_of_prompt(number, row): row for number, row in enumerate(rows)}
    right = [
        number
        for number, row in enumerate(trajectories)
        if score(asked[row["prompt_id"]], tokenizer.decode(row["completion_ids"], skip_special_tokens=True))
    ]
    if not right:
        raise UsageError(f"none of {len(trajectories)} completions is correct: leave out pack.only_right.")
    return trajectories.select(right)


def training_arguments(recipe: Recipe, phase: Phase, folder: Path, rows: int | None = None) -> JacobiForcingConfig:
    """
    The trainer's arguments for a phase.

    Args:
        recipe, phase: the recipe and its phase.
        folder: the folder of the checkpoints.
        rows: the number of rows to train on, if it is known; needed to spread checkpoints over epochs.

    Raises:
        `ValueError`: a value is out of range, or this machine does not support it.
    """
    given = {
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps",
        "eval_prompts": 0,
        **phase.train,
    }
    if phase.choose.jacobi_config is not None and given.get("jacobi_config") is None:
        given["jacobi_config"] = {"block_size": phase.block_size} | phase.choose.jacobi_config
    with of_usage(ValueError, ImportError, TypeError):
        probe = JacobiForcingConfig(output_dir=str(folder), **given)
    steps = probe.max_steps
    if steps <= 0:
        if rows is None:
            return probe
        batch = probe.per_device_train_batch_size
        per_epoch = math.ceil(math.ceil(rows / batch) / probe.gradient_accumulation_steps)
        steps = math.ceil(per_epoch * probe.num_train_epochs)
    log = given.get("logging_steps")
    every = given.get("save_steps") or max(1, steps // CHECKPOINTS)
    if "save_steps" not in given and log:
        every = max(log, every // log * log)
    given |= {"save_steps": every}
    given |= {"logging_steps": log or max(one for one in range(1, LOG_STEPS + 1) if every % one == 0)}
    return JacobiForcingConfig(output_dir=str(folder), **given)


class Telling(TrainerCallback):
    """Reports each step to the display, and saves a checkpoint after the last step."""

    def __init__(self, tell):
        self.tell = tell

    def on_train_begin(self, args, state, control, **kwargs):
        self.tell(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.tell(state.global_step, state.max_steps)
        control.should_save |= state.global_step >= state.max_steps
        return control


def train(place: Place, phase: Phase, tokenizer, tell) -> None:
    """Trains the model of a phase, starting from its last complete checkpoint if there is one."""
    recipe, folder = place.recipe, place.of(phase) / "training"
    packed: Dataset = open_prompts(str(place.of(phase) / "packed"))
    arguments = training_arguments(recipe, phase, folder, len(packed))
    start = place.start(phase)
    model_settings = arguments.model_init_kwargs
    assert not isinstance(model_settings, str)  # the arguments have parsed it
    arguments.model_init_kwargs = None  # the trainer gets a loaded model, which needs none
    model = load_model(recipe.model if is_adapter(start) else start, model_settings)
    peft_config = None if recipe.adapter is None or is_adapter(start) else lora(recipe.adapter)
    trainer = JacobiForcingTrainer(
        model=_with_adapter(model, start, is_trainable=True),
        args=arguments,
        train_dataset=packed,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[Telling(tell)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.base_name = recipe.model  # for the card, which must not name the folder of the previous phase
    last = whole_checkpoints(folder)[-1:]
    trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
    log = [
        {name: line[name] for name in sorted(line) if not name.endswith(OF_CLOCK)}
        for line in trainer.state.log_history
    ]
    write_json(place.of(phase) / "log.json", [line for line in log if "loss" in line])


def lora(adapter: dict[str, Any]) -> LoraConfig:
    """The LoRA configuration of a recipe's `adapter`."""
    from peft import LoraConfig

    with of_usage(ValueError, TypeError):
        return LoraConfig(**{"task_type": "CAUSAL_LM", **adapter})


def check_adapter_fits(recipe: Recipe) -> None:
    """Raises `UsageError` for an adapter that does not fit the model, or that cannot be draft-only but should be."""
    if recipe.adapter is None:
        return
    from peft import get_peft_model

    config = lora(recipe.adapter)
    if recipe.phases[0].train.get("adapter_scope") == "draft":
        refuse_changing(config, "the recipe's adapter")
    config.init_lora_weights = True  # other initializations compute with the weights, which the meta device lacks
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(recipe.model))
    with of_usage(ValueError, TypeError, RuntimeError):
        get_peft_model(model, config, low_cpu_mem_usage=True)


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a training in order; incomplete ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda one: int(one.name.rsplit("-", 1)[1]))
    for one in found:
        try:
            json.loads((one / "trainer_state.json").read_text())  # the trainer writes this file last
        except (OSError, ValueError):
            shutil.rmtree(one)
    return [one for one in found if one.exists()]


def choose_checkpoint(place: Place, phase: Phase, tokenizer, held_out, before, score, device, tell) -> None:
    """
    Decodes held-out prompts with the model that a phase started from and with its checkpoints, and keeps one of these.

    Args:
        held_out: the prompts, each a row and its token ids.
        before: the figures and texts of the model before all training (`reference`).
    """
    choice, recipe = phase.choose, place.recipe
    folder = place.of(phase)
    checkpoints = {int(one.name.rsplit("-", 1)[1]): one for one in whole_checkpoints(folder / "training")}
    models = {0: place.start(phase)} | {step: str(one) for step, one in checkpoints.items()}
    curve = []
    for number, (step, name) in enumerate(models.items()):
        file = folder / "choice" / f"step-{step}.json"
        if not file.exists():
            model = load(name, recipe.model, choice.dtype, device)
            settings = choice.decoding(phase.block_size, recipe.seed)
            first, total = number * len(held_out), len(models) * len(held_out)
            show = functools.partial(lambda first, total, done: tell(first + done, total), first, total)
            found, _ = figures_of(model, tokenizer, held_out, settings, choice, score, before["texts"], show)
            write_json(file, {"step": step} | found)
        curve.append(read_json(file))
    chosen = choose(curve[1:], before, choice)
    copy_whole(checkpoints[chosen["step"]], place.model(phase))
    note = {"curve": curve, "chosen": chosen["step"], "kept": keeps(chosen, before, choice)}
    write_json(folder / "choice.json", note)


def copy_whole(source: Path, target: Path) -> None:
    """Copies the files that a checkpoint needs for decoding, completely or not at all."""
    scratch = target.with_name(f".{target.name}.tmp")
    for leftover in (scratch, target):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, scratch, ignore=shutil.ignore_patterns(*LEFT_OUT))
    scratch.rename(target)


def reference(place: Place, phase: Phase, tokenizer, held_out, score, device, tell) -> dict[str, Any]:
    """The figures and texts of the model before all training, decoded once with the settings of the first phase."""
    file = place.folder / "before.json"
    digest = hashlib.blake2b(json.dumps([ids for _, ids in held_out]).encode(), digest_size=16).hexdigest()
    if not file.exists():
        choice, recipe = phase.choose, place.recipe
        model = load(recipe.model, recipe.model, choice.dtype, device)
        settings = choice.decoding(phase.block_size, recipe.seed)
        found, texts = figures_of(
            model, tokenizer, held_out, settings, choice, score, tell=lambda done: tell(done, len(held_out))
        )
        write_json(file, found | {"prompts": digest, "texts": texts})
    before = read_json(file)
    if before["prompts"] != digest:
        raise UsageError(
            f"the held-out prompts differ from those that {place.folder} was started with: use those, or name another "
            "folder."
        )
    return before


def report_of(place: Place, phase: Phase) -> dict[str, Any]:
    """The result of a phase that is done."""
    folder = place.of(phase)
    collected = read_report(place.trajectories(phase)).to_dict()
    kept = ("prompts", "sequences", "tokens", "blocks", "iterations_per_block", "tokens_per_iteration")
    packed = PackingStatistics.from_counts(counts_in(folder / "packed", "packed"))
    return {
        "name": phase.name,
        "block_size": phase.block_size,
        "trajectories": {name: collected[name] for name in kept},
        "packed": {
            "rows": packed.rows,
            "tokens": packed.clean_tokens + packed.noisy_tokens,
            "noisy_blocks": packed.blocks,
        },
        **read_json(folder / "choice.json"),
    }
