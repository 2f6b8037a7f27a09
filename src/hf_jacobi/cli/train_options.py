"""
The options of `hf-jacobi train`, read out of the sources of the dataclasses that hold them.

To import these takes seconds, since transformers and torch come with them. Whoever asks for help or mistypes an option
has the answer at once; a command that can run is parsed by TRL's own parser.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


NEEDED = ("train_dataset", "model_name_or_path")
SOURCES = (  # title, package, file in it, class
    ("the data", "hf_jacobi", "cli/train.py", "DataArguments"),
    ("Jacobi Forcing (JacobiForcingConfig)", "hf_jacobi", "training/config.py", "JacobiForcingConfig"),
    ("the model, and an adapter for it (TRL's ModelConfig)", "trl", "trainer/model_config.py", "ModelConfig"),
    ("training (transformers' TrainingArguments)", "transformers", "training_args.py", "TrainingArguments"),
)


@dataclass(frozen=True)
class Option:
    """
    A field of a dataclass.

    Attributes:
        name: of the field; the option has two dashes before it.
        type: its annotation, as it is written.
        default: its value if that is a literal, else `None`.
        help: what its metadata say.
    """

    name: str
    type: str
    default: Any
    help: str

    @property
    def names(self) -> tuple[str, ...]:
        """What can be typed, without dashes: also `no_...` where a switch is on by default."""
        return (self.name, f"no_{self.name}") if self.default is True else (self.name,)

    def add_to(self, group) -> None:
        """Adds it to a group of a parser that prints help."""
        types = {part.strip() for part in self.type.split("|")}
        shape: dict[str, Any] = {"metavar": "TEXT"}
        if "bool" in types:
            shape = {"metavar": "BOOL", "nargs": "?"}
        elif any(one.startswith("dict") for one in types):
            shape = {"metavar": "JSON"}
        elif any(one.startswith("list") for one in types) and "str" not in types:
            shape = {"metavar": "TEXT", "nargs": "+"}
        elif number := types & {"int", "float"}:
            shape = {"metavar": number.pop().upper()}
        default = "" if self.default in (None, "", []) else f" (default: {self.default})"
        group.add_argument(f"--{self.name}", **shape, help=self.help + default.replace("%", "%%"))


def options_of(source: str, name: str) -> list[Option]:
    """The fields of a dataclass that are options: those with a help text."""
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name).body
    fields = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)]
    return [_option(node) for node in fields if any(one.arg == "metadata" for one in node.value.keywords)]


def _option(node: ast.AnnAssign) -> Option:
    given = {keyword.arg: keyword.value for keyword in node.value.keywords}
    metadata = {key.value: value for key, value in zip(given["metadata"].keys, given["metadata"].values)}
    default = _literal(given.get("default"))
    return Option(node.target.id, ast.unparse(node.annotation), default, _literal(metadata.get("help")) or "")


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:  # an expression
        return None


def read_options() -> dict[str, list[Option]] | None:
    """
    The options by the title of their group, without those of packages that are not installed; `None` where a package
    is not as it is known here.
    """
    groups: dict[str, dict[str, Option]] = {}
    try:
        for title, package, file, name in SOURCES:
            if (found := importlib.util.find_spec(package)) is None:
                continue
            source = (Path(found.origin).parent / file).read_text(encoding="utf-8")
            for option in options_of(source, name):
                ours = next((group for group in groups.values() if option.name in group), {})  # has another default
                groups.setdefault(title, {})[option.name] = ours.pop(option.name, option)
    except (AttributeError, KeyError, OSError, StopIteration, SyntaxError):
        return None
    return {title: list(group.values()) for title, group in groups.items()}


def check(rest: Sequence[str], about: str) -> None:
    """
    Answers what needs no import: prints help, or ends with the usage where an option is unknown or one is missing.

    Args:
        rest: what was typed after `hf-jacobi train`.
        about: the command in a sentence.
    """
    groups = read_options()
    if groups is None:
        return  # TRL's parser answers
    parser = argparse.ArgumentParser(
        prog="hf-jacobi train",
        usage="hf-jacobi train --model_name_or_path MODEL --train_dataset DATA [options]\n"
        "       hf-jacobi train --config FILE [options]",
        description=about,
        epilog=None if len(groups) == len(SOURCES) else "There are more: pip install 'hf_jacobi[train]' brings them.",
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file of options; those that are typed go before it")
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for option in options:
            option.add_to(group)
    typed = [one[2:].partition("=")[0].replace("-", "_") for one in rest if one.startswith("--")]
    if "-h" in rest or "help" in typed:
        parser.print_help()
        parser.exit()
    if parser.epilog:
        return  # nothing can run
    known = ["config", *(name for options in groups.values() for option in options for name in option.names)]
    if unknown := [name for name in typed if not any(one.startswith(name) for one in known)]:
        parser.error(f"unrecognized arguments: {' '.join(f'--{name}' for name in unknown)}")
    missing = [f"--{name}" for name in NEEDED if not any(name.startswith(one) for one in typed)]
    if missing and "config" not in typed:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
