"""What a recipe says: a model, prompts, and phases that collect, pack, train and choose."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..decoding.compat import INVOCATION, fingerprint_of
from ..decoding.config import JacobiConfig
from ..decoding.errors import UsageError
from ..decoding.files import read_yaml
from ..training.config import JacobiForcingConfig
from ..trajectories.checks import check_real, check_whole
from ..trajectories.collect import collect_trajectories
from ..trajectories.collector import CollectSettings
from ..trajectories.corruption import pack_completions
from ..trajectories.packing import pack_trajectories


PREVIOUS = "previous"  # trajectories: those of the phase before
SECTIONS = ("collect", "pack", "train", "choose")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Of the arguments of each section, those that a recipe decides itself, and how.
OURS_OF_DATA = {
    "block_size": "it stands beside the phase",
    "output_dir": "the recipe's folder holds everything",
    "progress": "a recipe has a display of its own",
}
OURS = {
    "output_dir": "the recipe's folder holds everything",
    "resume_from_checkpoint": "a recipe goes on by itself",
    "block_size": "it stands beside the phase",
    "eval_strategy": "`choose` looks at the checkpoints",
    "eval_steps": "`choose` looks at the checkpoints",
    "eval_prompts": "`choose.count` says how many",
    "eval_max_new_tokens": "`choose.max_new_tokens` says how far",
    "load_best_model_at_end": "`choose` looks at the checkpoints",
    "metric_for_best_model": "`choose` looks at the checkpoints",
    "save_strategy": "`save_steps` says how often",
    "save_only_model": "a recipe goes on from its checkpoints",
    "refresh_steps": "phases collect anew; within a training, it is the trainer's `refresh`",
    "push_to_hub": "push the finished model with `hf-jacobi push`",
    "disable_tqdm": "a recipe has a display of its own",
    "do_train": "a recipe trains",
    "do_eval": "`choose` looks at the checkpoints",
    "do_predict": "a recipe predicts nothing",
}


@dataclass(frozen=True)
class Choice:
    """
    How a phase chooses among its checkpoints, by decoding held-out prompts.

    Args:
        count: how many prompts; without `held_out` so many at the end of the prompts are held out.
        max_new_tokens: how far.
        batch_size: prompts decoded together.
        dtype: what the model computes in.
        min_agreement: the share of tokens that must be those of the text before all training, up to the first that
            is not, for the quality to count as kept. Not looked at with a `score`.
        score: a function of a row of prompts and its completion's text, or its name (`module:function`,
            `file.py:function`), which says whether the answer is right.
        max_score_loss: how far the share of right answers may fall below that before all training.
        near: the share of the tokens per forward that may be lost for better quality.
        jacobi_config: settings that are decoded with, which the model keeps unless `train.jacobi_config` says
            otherwise; blocks like those of the phase if left out.
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
            check_real(f"choose.{name}", getattr(self, name))
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"choose.{name} must be from 0 to 1, got {getattr(self, name)}.")
        check_dtype("choose.dtype", self.dtype)
        decoding = JacobiConfig.coerce(self.decoding(2, 0))
        if decoding.adapts and decoding.position_cost is None:
            raise UsageError(
                "choose.jacobi_config: a window that adapts itself follows the clock of this machine, so that no two "
                "runs would choose alike: give it a fixed block_size, or a position_cost."
            )

    def decoding(self, block_size: int, seed: int) -> dict[str, Any]:
        """The settings of `JacobiConfig` that a phase is decoded with."""
        return {"block_size": block_size, "seed": seed} | (self.jacobi_config or {})


@dataclass(frozen=True)
class Phase:
    """
    One round.

    Args:
        name: of its folder.
        block_size: n.
        collect: arguments of `collect_trajectories`, and `max_prompts`, `skip_prompts`, `dtype`; `None` for the
            trajectories of the phase before.
        pack: arguments of `pack_trajectories`, or, where `noise` is among them, of `pack_completions`; and
            `only_right`.
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
    A training in phases. `read_recipe` makes one out of a file or a dictionary.

    Args:
        model: the name or folder of the model that it begins with.
        prompts: the prompts that trajectories are collected from, as for `collect_trajectories`.
        phases: the rounds, one after the other, each with the model that the one before chose.
        held_out: the prompts that checkpoints are tried on; left out, the last `choose.count` of `prompts`.
        adapter: settings of a `LoraConfig`; `None` trains the whole model.
        seed: of everything that is drawn, unless a section has its own.
        keep_checkpoints: whether those that were not chosen stay.
    """

    model: str
    prompts: Any
    phases: tuple[Phase, ...]
    held_out: Any = None
    adapter: dict[str, Any] | None = None
    seed: int = 0
    keep_checkpoints: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All settings, JSON-serializable; data and functions by their names or digests."""
        content = dataclasses.asdict(self) | {"prompts": named(self.prompts), "held_out": named(self.held_out)}
        for phase in content["phases"]:
            score = phase["choose"]["score"]
            phase["choose"]["score"] = getattr(score, "__qualname__", score)
        return content


def named(source: Any) -> Any:
    """Data as a recipe's file may name it: as it is, or by a digest of what was handed over."""
    if source is None or isinstance(source, (str, Mapping)):
        return source
    if isinstance(source, Path):
        return str(source)
    from datasets.fingerprint import Hasher

    return f"data {fingerprint_of(source) or Hasher.hash(source)}"


def read_recipe(source: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """
    A recipe out of a YAML file or a dictionary, looked at as a whole.

    `collect`, `pack`, `train` and `choose` may stand above the phases, for all of them; a phase's own settings take
    precedence one by one.

    Raises:
        `OSError`: there is no such file.
        `ValueError`: it is no YAML, lacks something, has a setting that there is not, or one of a wrong kind; the
            message names it, and the nearest right one.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, (str, Path)):
        source = read_yaml(Path(source).expanduser(), "a recipe")
    if not isinstance(source, Mapping):
        raise UsageError(f"a recipe is a file or a dictionary of settings, got {type(source).__name__}.")
    own = [one.name for one in fields(Recipe)]
    check_names("the recipe", source, [*own, *SECTIONS])
    if missing := [name for name in ("model", "prompts", "phases") if source.get(name) in (None, "", [])]:
        raise UsageError(f"the recipe has no {' and no '.join(missing)}: a model, prompts and phases are needed.")
    content = {name: value for name, value in source.items() if name in own}
    seed = content["seed"] = coerced("seed", content.get("seed", 0), "int")
    content["keep_checkpoints"] = coerced("keep_checkpoints", content.get("keep_checkpoints", False), "bool")
    if not isinstance(source["model"], (str, Path)):
        raise UsageError(f"`model` must be the name or the folder of a model, got {type(source['model']).__name__}.")
    content["model"] = str(source["model"])
    phases = source["phases"]
    if not isinstance(phases, (list, tuple)) or not all(isinstance(phase, Mapping) for phase in phases):
        raise UsageError("`phases` must be a list of phases, each of them settings such as block_size.")
    shared = {name: section(name, source.get(name)) for name in SECTIONS}
    content["phases"] = tuple(_phase(number, phase, shared, seed) for number, phase in enumerate(phases, start=1))
    if content.get("adapter") is not None:
        content["adapter"] = check_adapter(content["adapter"])
    recipe = Recipe(**content)
    check_phases(recipe)
    return recipe


def section(name: str, value: Any) -> dict[str, Any]:
    """A section as a dictionary."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"`{name}` must hold settings, one `name: value` a line, got {value!r:.60}.")
    return dict(value)


def _phase(number: int, given: Mapping[str, Any], shared: dict[str, dict[str, Any]], seed: int) -> Phase:
    where = f"phase {number}"
    check_names(where, given, [one.name for one in fields(Phase)])
    if given.get("block_size") is None:
        raise UsageError(f"{where} has no block_size: give it the length of its blocks.")
    size = coerced(f"block_size of {where}", given["block_size"], "int")
    check_whole(f"block_size of {where}", size, 2)
    reuses = given.get("collect") == PREVIOUS
    own = {name: section(name, None if reuses and name == "collect" else given.get(name)) for name in SECTIONS}
    settings = {name: shared[name] | own[name] for name in SECTIONS}
    if reuses and number == 1:
        raise UsageError(f"collect of phase 1 is {PREVIOUS!r}, but there is no phase before it.")
    collect = None if reuses else check_collect(settings["collect"], size, seed)
    pack = check_pack(settings["pack"], size, seed)
    train = check_train(settings["train"], seed)
    names = kinds_of(Choice)
    choose = Choice(**check_section("choose", settings["choose"], names))
    if pack.get("only_right") and choose.score is None:
        raise UsageError("pack.only_right keeps the answers that choose.score says are right: name a function there.")
    name = coerced(f"name of {where}", given.get("name", f"n{size}"), "str")
    if not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(f"the name of {where} becomes a folder: use letters, digits, `-`, `_` and `.`, not {name!r}.")
    return Phase(f"{number}-{name}", size, collect, pack, train, choose)


def check_phases(recipe: Recipe) -> None:
    """Raises `UsageError` for phases that do not follow on each other."""
    for before, after in zip(recipe.phases, recipe.phases[1:]):
        if after.block_size < before.block_size:
            raise UsageError(
                f"block_size shrinks from {before.block_size} to {after.block_size} in phase {after.name}: blocks "
                "grow from phase to phase, or stay as they are."
            )
        if after.collect is None and after.block_size != before.block_size:
            raise UsageError(
                f"phase {after.name} takes the trajectories of the phase before, whose blocks have "
                f"{before.block_size} tokens: its block_size must be that, not {after.block_size}."
            )
    for name, default in (("adapter_scope", "all"), ("bf16", False), ("fp16", False), ("use_cpu", False)):
        if len({phase.train.get(name, default) for phase in recipe.phases}) > 1:
            raise UsageError(f"train.{name} must be the same in all phases: they train one model in one process.")
    if recipe.adapter is None and recipe.phases[0].train.get("adapter_scope") == "draft":
        raise UsageError("train.adapter_scope 'draft' trains an adapter: give the recipe an `adapter`.")


def check_collect(given: dict[str, Any], block_size: int, seed: int) -> dict[str, Any]:
    """The arguments of collecting, of the right kinds."""
    refuse_ours("collect", given, OURS_OF_DATA)
    ours = ("model", "tokenizer", "dataset", "completions", "check", "output_dir", "block_size", "progress")
    kinds = arguments_of(collect_trajectories, ours)
    own = {"max_prompts": "int", "skip_prompts": "int", "dtype": "str"}
    settings = {"seed": seed} | check_section("collect", given, kinds | own)
    check_dtype("collect.dtype", settings.get("dtype", "auto"))
    for name, least in (("max_prompts", 1), ("skip_prompts", 0)):
        if settings.get(name) is not None:
            check_whole(f"collect.{name}", settings[name], least)
    defaults = {name: one.default for name, one in inspect.signature(collect_trajectories).parameters.items()}
    known = defaults | settings | {"block_size": block_size}
    with in_section("collect"):
        CollectSettings(**{one.name: known[one.name] for one in fields(CollectSettings)})
    return settings


def check_pack(given: dict[str, Any], block_size: int, seed: int) -> dict[str, Any]:
    """The arguments of packing, of the right kinds; with `noise` those of `pack_completions`."""
    refuse_ours("pack", given, OURS_OF_DATA)
    function, ours = pack_trajectories, {}
    if given.get("noise") is not None:
        function, ours = pack_completions, {"tokenizer": 1, "block_size": block_size}
    kinds = arguments_of(function, ("trajectories", "completions", "output_dir", "progress", *ours))
    settings = {"seed": seed} | check_section("pack", given, kinds | {"only_right": "bool"})
    arguments = {name: value for name, value in settings.items() if name != "only_right"}
    with in_section("pack"):
        try:
            function([], **ours, **arguments)
        except UsageError as error:
            if "there are no" not in str(error):
                raise
    return settings


def refuse_ours(where: str, given: dict[str, Any], ours: Mapping[str, str]) -> None:
    """Raises `UsageError` for a setting that a recipe decides itself."""
    for name, instead in ours.items():
        if name in given:
            raise UsageError(f"{where}.{name} is not for a recipe: {instead}.")


def check_train(given: dict[str, Any], seed: int) -> dict[str, Any]:
    """The arguments of the trainer, of the right kinds; their values are looked at on the machine that trains."""
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
            f"train.save_steps must be a multiple of train.logging_steps, so that a run that goes on logs what it "
            f"would have logged: {every} is none of {log}."
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
    """Raises `UsageError` for a dtype that there is not."""
    if value not in DTYPES:
        raise UsageError(f"{name} must be one of {DTYPES}, got {value!r}.")


def as_whole(value: Any) -> Any:
    """A number without a fraction as an integer; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class in_section:
    """Errors raised inside begin with the name of the section."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, UsageError):
            raise UsageError(f"{self.name}: {error}") from error


def arguments_of(function: Callable, without: Iterable[str]) -> dict[str, str]:
    """The arguments of a function, name to annotation, but some."""
    found = inspect.signature(function).parameters
    return {name: str(one.annotation) for name, one in found.items() if name not in without}


def kinds_of(dataclass: type) -> dict[str, str]:
    """The settings of a dataclass, name to annotation: as written, since a parser of commands changes the fields."""
    written = {
        name: str(kind) for cls in reversed(dataclass.__mro__) for name, kind in inspect.get_annotations(cls).items()
    }
    return {one.name: written[one.name] for one in fields(dataclass) if one.init}


def check_names(where: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises `UsageError` for a setting that there is not, with the nearest that there is."""
    known = list(known)
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(str(name), known, n=1)
        also = f": did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known)[:24])}."
        raise UsageError(f"{where} has no setting {name!r}{also}")


def check_section(where: str, given: dict[str, Any], kinds: dict[str, str]) -> dict[str, Any]:
    """The settings of a section, each of the kind that its annotation says."""
    check_names(where, given, kinds)
    return {name: coerced(f"{where}.{name}", value, kinds[name]) for name, value in given.items()}


PLAIN = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "settings",
    "list": "a list",
}


def coerced(name: str, value: Any, annotation: str) -> Any:
    """
    A value of the kind that an annotation of plain types says. YAML takes `1e-6` for text: it is a number here.

    Raises:
        `UsageError`: it is of another kind.
    """
    text = re.sub(r"<class '(\w+)'>", r"\1", annotation.replace("typing.", "").replace("Optional", "None |"))
    kinds = {kind.strip() for kind in re.sub(r"\[[^|]*\]", "", text).split("|")}
    names = kinds - {"None"}
    if not names <= PLAIN.keys() or (value is None and "None" in kinds):
        return value
    numbers = {"int", "float"} & names
    if isinstance(value, str) and numbers and "str" not in names:
        value = _number(value)
    found = {bool: "bool", int: "int", float: "float", str: "str", dict: "dict", list: "list", tuple: "list"}
    kind = next((found[one] for one in found if isinstance(value, one)), None)
    fits = kind in names or (kind == "int" and "float" in names)
    if kind == "float" and names == {"int"} and value.is_integer():
        return int(value)
    if not fits or (kind == "float" and not math.isfinite(value) and "inf" not in str(value)):
        wanted = " or ".join(PLAIN[one] for one in PLAIN if one in names)
        raise UsageError(f"{name} must be {wanted}, got {value!r:.60}.")
    return value


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
