"""Reads and checks recipes: a model, prompts, and phases that collect, pack, train and choose."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..decoding.compat import INVOCATION, fingerprint_of
from ..decoding.config import JacobiConfig
from ..decoding.errors import UsageError, check_range
from ..decoding.files import read_yaml
from ..training.config import JacobiForcingConfig
from ..trajectories.checks import check_whole
from ..trajectories.collect import collect_trajectories
from ..trajectories.collector import CollectSettings
from ..trajectories.corruption import NoiseSettings, pack_completions, share_for
from ..trajectories.packing import PackSettings, pack_trajectories


PREVIOUS = "previous"  # the value of `collect` that reuses the trajectories of the previous phase
SECTIONS = ("collect", "pack", "train", "choose")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# The arguments of each section that a recipe sets itself, and what to do instead.
OURS_OF_DATA = {
    "block_size": "set `block_size` of the phase",
    "output_dir": "everything is written into the recipe's folder",
    "progress": "a recipe shows its own progress",
}
OURS = {
    "output_dir": "everything is written into the recipe's folder",
    "resume_from_checkpoint": "a recipe resumes by itself",
    "block_size": "set `block_size` of the phase",
    "eval_strategy": "`choose` evaluates the checkpoints",
    "eval_steps": "`choose` evaluates the checkpoints",
    "eval_prompts": "set `choose.count`",
    "eval_max_new_tokens": "set `choose.max_new_tokens`",
    "load_best_model_at_end": "`choose` evaluates the checkpoints",
    "metric_for_best_model": "`choose` evaluates the checkpoints",
    "save_strategy": "set `save_steps`",
    "save_only_model": "a recipe resumes from its checkpoints",
    "refresh_steps": "add a phase, which collects again; only the trainer has `refresh`",
    "push_to_hub": "push the finished model with `hf-jacobi push`",
    "disable_tqdm": "a recipe shows its own progress",
    "do_train": "a recipe always trains",
    "do_eval": "`choose` evaluates the checkpoints",
    "do_predict": "a recipe does not predict",
}


@dataclass(frozen=True)
class Choice:
    """
    How a phase chooses one of its checkpoints, by decoding held-out prompts.

    Args:
        count: the number of prompts. Without `held_out`, this many prompts at the end of `prompts` are held out.
        max_new_tokens: the maximum number of new tokens per prompt.
        batch_size: the number of prompts decoded together.
        dtype: the data type that the model computes in.
        min_agreement: the lowest agreement with the text before all training, 0 to 1, at which quality counts as kept:
            the share of that text's tokens before the first difference. Ignored with a `score`.
        score: a function of a prompt's row and the text of its completion that says whether the answer is correct, or
            its name (`module:function` or `file.py:function`).
        max_score_loss: the largest loss in the share of correct answers, compared with the model before all training,
            at which quality counts as kept.
        near: the share of the tokens per forward that may be given up for higher quality, 0 to 1.
        jacobi_config: the settings to decode with, which the model keeps unless `train.jacobi_config` is given; by
            default blocks of the phase's size.
    """

    count: int = 64
    max_new_tokens: int = 256
    batch_size: int = 8
    dtype: str = "float32"
    min_agreement: float = 0.5
    score: str | Callable[[Any, str], bool] | None = None
    max_score_loss: float = 0.01
    near: float = 0.02
    jacobi_config: dict[str, Any] | None = None

    def __post_init__(self):
        for name in ("count", "max_new_tokens", "batch_size"):
            check_whole(f"choose.{name}", getattr(self, name), 1)
        for name in ("min_agreement", "max_score_loss", "near"):
            check_range(f"choose.{name}", getattr(self, name), 0, 1)
        check_dtype("choose.dtype", self.dtype)
        decoding = JacobiConfig.coerce(self.decoding(2, 0))
        if decoding.adapts and decoding.position_cost is None:
            raise UsageError(
                "choose.jacobi_config: an adaptive window depends on the timing of this machine, so two runs could "
                "choose differently: set a fixed block_size, or a position_cost."
            )

    def decoding(self, block_size: int, seed: int) -> dict[str, Any]:
        """The `JacobiConfig` settings that the checkpoints of a phase are decoded with."""
        return {"block_size": block_size, "seed": seed} | (self.jacobi_config or {})


@dataclass(frozen=True)
class Phase:
    """
    One phase of a recipe.

    Args:
        name: the name of its folder.
        block_size: n, tokens of a block.
        collect: arguments of `collect_trajectories`, and `max_prompts`, `skip_prompts` and `dtype`; `None` reuses the
            trajectories of the previous phase.
        pack: arguments of `pack_trajectories`, or of `pack_completions` if `noise` is among them; and `only_right`.
        train: arguments of `JacobiForcingConfig`.
        choose: how a checkpoint is chosen.
    """

    name: str
    block_size: int
    collect: dict[str, Any] | None = field(default_factory=dict)
    pack: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    choose: Choice = field(default_factory=Choice)


@dataclass(frozen=True)
class Recipe:
    """
    A training in phases. `read_recipe` makes one from a file or a dictionary.

    Args:
        model: the name or folder of the initial model.
        prompts: the prompts that trajectories are collected from, as for `collect_trajectories`.
        phases: the phases in order; each starts from the model that the previous phase chose.
        held_out: the prompts that checkpoints are evaluated on, by default the last `choose.count` of `prompts`.
        adapter: `LoraConfig` settings; `None` trains the whole model.
        seed: the seed of all random draws, unless a section has its own.
        keep_checkpoints: whether to keep the checkpoints that were not chosen.
    """

    model: str
    prompts: Any
    phases: tuple[Phase, ...]
    held_out: Any = None
    adapter: dict[str, Any] | None = None
    seed: int = 0
    keep_checkpoints: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All settings, JSON-serializable: data and functions are replaced by their names or digests."""
        content = dataclasses.asdict(self) | {"prompts": named(self.prompts), "held_out": named(self.held_out)}
        for phase in content["phases"]:
            score = phase["choose"]["score"]
            phase["choose"]["score"] = getattr(score, "__qualname__", score)
        return content


def named(source: Any) -> Any:
    """The name of data in a recipe's file, or a digest of data that has no name."""
    if source is None or isinstance(source, (str, Mapping)):
        return source
    if isinstance(source, Path):
        return str(source)
    from datasets.fingerprint import Hasher

    return f"data {fingerprint_of(source) or Hasher.hash(source)}"


def read_recipe(source: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """
    Reads a recipe from a YAML file or a dictionary, and checks all of it.

    `collect`, `pack`, `train` and `choose` at the top level apply to all phases; each setting of a phase overrides the
    one at the top level.

    Raises:
        `OSError`: the file does not exist.
        `ValueError`: the file is not YAML, or a setting is missing, unknown or of the wrong kind; the message names
            it, and the nearest known setting.
    """
    if isinstance(source, Recipe):
        return source
    given = _settings_in(source)
    content = {name: given[name] for name in given if name not in SECTIONS}
    seed = content["seed"] = coerced("seed", given.get("seed", 0), "int")
    content["keep_checkpoints"] = coerced("keep_checkpoints", given.get("keep_checkpoints", False), "bool")
    if not isinstance(given["model"], (str, Path)):
        raise UsageError(f"`model` must be the name or the folder of a model, got {type(given['model']).__name__}.")
    content["model"] = str(given["model"])
    content["phases"] = _phases(given, seed)
    if given.get("adapter") is not None:
        content["adapter"] = check_adapter(given["adapter"])
    recipe = Recipe(**content)
    check_phases(recipe)
    return recipe


def _settings_in(source: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """The settings at the top level of a recipe, whose names are known and of which none is missing."""
    if isinstance(source, (str, Path)):
        source = read_yaml(Path(source).expanduser(), "a recipe")
    if not isinstance(source, Mapping):
        raise UsageError(f"a recipe must be a file or a dictionary of settings, got {type(source).__name__}.")
    check_names("the recipe", source, [*(one.name for one in fields(Recipe)), *SECTIONS])
    if missing := [name for name in ("model", "prompts", "phases") if source.get(name) in (None, "", [])]:
        raise UsageError(f"the recipe has no {' and no '.join(missing)}: it needs a model, prompts and phases.")
    return source


def section(name: str, value: Any) -> dict[str, Any]:
    """A section as a dictionary."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"`{name}` must hold settings, one `name: value` per line, got {value!r:.60}.")
    return dict(value)


def _phases(given: Mapping[str, Any], seed: int) -> tuple[Phase, ...]:
    phases = given["phases"]
    if not isinstance(phases, (list, tuple)) or not all(isinstance(phase, Mapping) for phase in phases):
        raise UsageError("`phases` must be a list of phases, each with settings such as block_size.")
    shared = {name: section(name, given.get(name)) for name in SECTIONS}
    return tuple(_phase(number, phase, shared, seed) for number, phase in enumerate(phases, start=1))


def _phase(number: int, given: Mapping[str, Any], shared: dict[str, dict[str, Any]], seed: int) -> Phase:
    where = f"phase {number}"
    check_names(where, given, [one.name for one in fields(Phase)])
    if given.get("block_size") is None:
        raise UsageError(f"{where} has no block_size: set the number of tokens in a block.")
    size = coerced(f"block_size of {where}", given["block_size"], "int")
    check_whole(f"block_size of {where}", size, 2)
    reuses = given.get("collect") == PREVIOUS
    own = {name: section(name, None if reuses and name == "collect" else given.get(name)) for name in SECTIONS}
    settings = {name: shared[name] | own[name] for name in SECTIONS}
    if reuses and number == 1:
        raise UsageError(f"collect of phase 1 is {PREVIOUS!r}, but there is no phase before it: give it settings.")
    collect = None if reuses else check_collect(settings["collect"], size, seed)
    pack = check_pack(settings["pack"], size, seed)
    train = check_train(settings["train"], seed)
    names = kinds_of(Choice)
    choose = Choice(**check_section("choose", settings["choose"], names))
    if pack.get("only_right") and choose.score is None:
        raise UsageError("pack.only_right keeps the answers that choose.score accepts: name a function there.")
    name = coerced(f"name of {where}", given.get("name", f"n{size}"), "str")
    if not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(
            f"the name of {where} becomes a folder name: use only letters, digits, `-`, `_` and `.`, got {name!r}."
        )
    return Phase(f"{number}-{name}", size, collect, pack, train, choose)


def check_phases(recipe: Recipe) -> None:
    """Raises `UsageError` for phases that do not fit together."""
    for before, after in zip(recipe.phases, recipe.phases[1:]):
        if after.block_size < before.block_size:
            raise UsageError(
                f"block_size shrinks from {before.block_size} to {after.block_size} in phase {after.name}: it must "
                "grow from phase to phase, or stay the same."
            )
        if after.collect is None and after.block_size != before.block_size:
            raise UsageError(
                f"phase {after.name} reuses the trajectories of the previous phase, whose blocks have "
                f"{before.block_size} tokens: set its block_size to {before.block_size}, not {after.block_size}."
            )
    for name, default in (("adapter_scope", "all"), ("bf16", False), ("fp16", False), ("use_cpu", False)):
        if len({phase.train.get(name, default) for phase in recipe.phases}) > 1:
            raise UsageError(f"train.{name} must be the same in all phases: they train one model in one process.")
    if recipe.adapter is None and recipe.phases[0].train.get("adapter_scope") == "draft":
        raise UsageError("train.adapter_scope 'draft' trains an adapter: give the recipe an `adapter`.")


def check_collect(given: dict[str, Any], block_size: int, seed: int) -> dict[str, Any]:
    """The arguments for collecting, converted and checked."""
    refuse_ours("collect", given, OURS_OF_DATA)
    ours = ("model", "tokenizer", "dataset", "completions", "check", "output_dir", "block_size", "progress")
    kinds = arguments_of(collect_trajectories, ours)
    own = {"max_prompts": "int", "skip_prompts": "int", "dtype": "str"}
    settings = {"seed": seed} | check_section("collect", given, kinds | own)
    check_dtype("collect.dtype", settings.get("dtype", "auto"))
    for name, least in (("max_prompts", 1), ("skip_prompts", 0)):
        if settings.get(name) is not None:
            check_whole(f"collect.{name}", settings[name], least)
    known = defaults_of(collect_trajectories) | settings | {"block_size": block_size}
    with in_section("collect"):
        CollectSettings(**{one.name: known[one.name] for one in fields(CollectSettings)})
    return settings


def check_pack(given: dict[str, Any], block_size: int, seed: int) -> dict[str, Any]:
    """The arguments for packing, converted and checked; with `noise` those of `pack_completions`."""
    refuse_ours("pack", given, OURS_OF_DATA)
    has_noise = given.get("noise") is not None
    function: Callable = pack_completions if has_noise else pack_trajectories
    checked: type[NoiseSettings] | type[PackSettings] = NoiseSettings if has_noise else PackSettings
    ours = ("trajectories", "completions", "tokenizer", "block_size", "output_dir", "progress")
    settings = {"seed": seed} | check_section("pack", given, arguments_of(function, ours) | {"only_right": "bool"})
    known = defaults_of(function) | settings | {"block_size": block_size, "allowed": range(1)}
    with in_section("pack"):
        if has_noise:
            known["corrupt_share"] = share_for(known["noise"], known["corrupt_share"])
        checked(**{one.name: known[one.name] for one in fields(checked)})
        check_whole("shard_size", known["shard_size"], 1)
    return settings


def refuse_ours(where: str, given: dict[str, Any], ours: Mapping[str, str]) -> None:
    """Raises `UsageError` for a setting that a recipe sets itself."""
    for name, instead in ours.items():
        if name in given:
            raise UsageError(f"{where}.{name} cannot be set in a recipe: {instead}.")


def check_train(given: dict[str, Any], seed: int) -> dict[str, Any]:
    """The arguments of the trainer, converted; their values are checked on the machine that trains."""
    refuse_ours("train", given, OURS)
    kinds = {name: kind for name, kind in kinds_of(JacobiForcingConfig).items() if name not in OURS}
    settings = {"seed": seed} | check_section("train", given, kinds)
    for name in ("save_steps", "logging_steps"):
        if name in settings:
            check_whole(f"train.{name}", as_whole(settings[name]), 1)
            settings[name] = as_whole(settings[name])
    every, log = settings.get("save_steps"), settings.get("logging_steps")
    if every and log and every % log:
        raise UsageError(
            f"train.save_steps must be a multiple of train.logging_steps, so that a resumed run logs the same steps: "
            f"{every} is not a multiple of {log}."
        )
    return settings


def check_adapter(given: Any) -> dict[str, Any]:
    """The settings of a LoRA."""
    from peft import LoraConfig

    given = section("adapter", given)
    ours = ("invocation_tokens", INVOCATION, "task_type", "peft_type")
    names = {name: kind for name, kind in kinds_of(LoraConfig).items() if name not in ours}
    return check_section("adapter", given, names)


def check_dtype(name: str, value: str) -> None:
    """Raises `UsageError` for an unknown dtype."""
    if value not in DTYPES:
        raise UsageError(f"{name} must be one of {DTYPES}, got {value!r}.")


def as_whole(value: Any) -> Any:
    """A float without a fraction as an integer; any other value unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@contextmanager
def in_section(name: str):
    """Puts the name of the section before the message of a `UsageError` raised inside."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error


def arguments_of(function: Callable, without: Iterable[str]) -> dict[str, str]:
    """Maps the arguments of a function, except those in `without`, to their annotations."""
    found = inspect.signature(function).parameters
    return {name: str(one.annotation) for name, one in found.items() if name not in without}


def defaults_of(function: Callable) -> dict[str, Any]:
    """Maps the arguments of a function to their defaults."""
    return {name: one.default for name, one in inspect.signature(function).parameters.items()}


def kinds_of(dataclass: type) -> dict[str, str]:
    """
    Maps the settings of a dataclass to their annotations as written in the source: `HfArgumentParser` changes the
    types of the fields.
    """
    written = {
        name: str(kind) for cls in reversed(dataclass.__mro__) for name, kind in inspect.get_annotations(cls).items()
    }
    return {one.name: written[one.name] for one in fields(dataclass) if one.init}


def check_names(where: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises `UsageError` for an unknown setting, and names the nearest known one."""
    known = list(known)
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(str(name), known, n=1)
        also = f": did you mean {near[0]!r}?" if near else f"; the settings are {', '.join(sorted(known)[:24])}."
        raise UsageError(f"{where} has no setting {name!r}{also}")


def check_section(where: str, given: dict[str, Any], kinds: dict[str, str]) -> dict[str, Any]:
    """The settings of a section, each converted to the kind that its annotation names."""
    check_names(where, given, kinds)
    return {name: coerced(f"{where}.{name}", value, kinds[name]) for name, value in given.items()}


WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "settings",
    "list": "a list",
}


KINDS = {bool: "bool", int: "int", float: "float", str: "str", dict: "dict", list: "list", tuple: "list"}


def coerced(name: str, value: Any, annotation: str) -> Any:
    """
    A value converted to the kind that an annotation of plain types names. Text such as `1e-6`, which YAML does not
    read as a number, becomes a number where one is wanted.

    Raises:
        `UsageError`: the value is of another kind.
    """
    names = _kinds_in(annotation)
    wanted = names - {"None"}
    if not wanted <= WORDS.keys() or (value is None and "None" in names):
        return value
    if isinstance(value, str) and wanted & {"int", "float"} and "str" not in wanted:
        value = _number(value)
    if wanted == {"int"}:
        value = as_whole(value)
    if not _fits(value, wanted):
        described = " or ".join(WORDS[one] for one in WORDS if one in wanted)
        raise UsageError(f"{name} must be {described}, got {value!r:.60}.")
    return value


def _kinds_in(annotation: str) -> set[str]:
    """The plain types in an annotation, such as `{"int", "None"}` for `int | None`."""
    text = re.sub(r"<class '(\w+)'>", r"\1", annotation.replace("typing.", "").replace("Optional", "None |"))
    return {kind.strip() for kind in re.sub(r"\[[^|]*\]", "", text).split("|")}


def _fits(value: Any, wanted: set[str]) -> bool:
    kind = next((name for one, name in KINDS.items() if isinstance(value, one)), None)
    if kind == "float" and math.isnan(value):
        return False
    return kind in wanted or (kind == "int" and "float" in wanted)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
