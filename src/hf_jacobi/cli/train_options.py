"""
Reads the options of `hf-jacobi train` from the source code of the dataclasses that define them.

Importing the dataclasses also imports transformers and torch, which takes seconds. Without the imports, the help and
the message about a mistyped option appear at once. TRL's parser parses a command that can run.
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
SOURCES = (  # title, package, file, class
    ("the data", "hf_jacobi", "cli/train.py", "DataArguments"),
    ("Jacobi Forcing (JacobiForcingConfig)", "hf_jacobi", "training/config.py", "JacobiForcingConfig"),
    ("the model, and an adapter for it (TRL's ModelConfig)", "trl", "trainer/model_config.py", "ModelConfig"),
    ("training (transformers' TrainingArguments)", "transformers", "training_args.py", "TrainingArguments"),
)


@dataclass(frozen=True)
class Option:
    """
    An option, defined by a field of a dataclass.

    Attributes:
        name: the name of the field, without the option's dashes.
        type: its annotation as written.
        default: its default value if that is a literal, else `None`.
        help: the help text in its metadata.
    """

    name: str
    type: str
    default: Any
    help: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the option without dashes, including `no_...` for a switch that is on by default."""
        return (self.name, f"no_{self.name}") if self.default is True else (self.name,)

    def add_to(self, group) -> None:
        """Adds the option to a group of a parser that prints help."""
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
    """The options among the fields of a dataclass, which are the fields with metadata."""
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name).body
    options = (_option(node) for node in body if isinstance(node, ast.AnnAssign))
    return [option for option in options if option is not None]


def _option(node: ast.AnnAssign) -> Option | None:
    """The option that a field defines, as in `name: type = field(default=..., metadata={"help": ...})`."""
    if not isinstance(node.value, ast.Call) or not isinstance(node.target, ast.Name):
        return None
    given = {keyword.arg: keyword.value for keyword in node.value.keywords}
    metadata = given.get("metadata")
    if metadata is None:
        return None
    if not isinstance(metadata, ast.Dict):
        raise ValueError(f"the metadata of {node.target.id} are not written as a dictionary")
    texts = {_literal(key): value for key, value in zip(metadata.keys, metadata.values)}
    help_text = _literal(texts.get("help")) or ""
    return Option(node.target.id, ast.unparse(node.annotation), _literal(given.get("default")), help_text)


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:  # not a literal
        return None


def read_options() -> dict[str, list[Option]] | None:
    """
    The options by the title of their group, without those of packages that are not installed; `None` if the source of
    a package has an unexpected form.
    """
    groups: dict[str, dict[str, Option]] = {}
    try:
        for title, package, file, name in SOURCES:
            found = importlib.util.find_spec(package)
            if found is None or found.origin is None:
                continue
            source = (Path(found.origin).parent / file).read_text(encoding="utf-8")
            for option in options_of(source, name):
                # A field that our dataclass redefines keeps our default, but moves to the group of its origin.
                ours = next((group for group in groups.values() if option.name in group), {})
                groups.setdefault(title, {})[option.name] = ours.pop(option.name, option)
    except (OSError, StopIteration, SyntaxError, ValueError):
        return None
    return {title: list(group.values()) for title, group in groups.items()}


def check(rest: Sequence[str], about: str) -> None:
    """
    Does what needs no import: prints the help, or exits with the usage if an option is unknown or missing.

    Args:
        rest: the arguments after `hf-jacobi train`.
        about: the command in one sentence.
    """
    groups = read_options()
    if groups is None:
        return  # TRL's parser does this
    is_complete = len(groups) == len(SOURCES)
    typed = [one[2:].partition("=")[0].replace("-", "_") for one in rest if one.startswith("--")]
    parser = _help_parser(groups, about, is_complete)
    if "-h" in rest or "help" in typed:
        parser.print_help()
        parser.exit()
    if not is_complete:
        return  # `train` reports the missing package
    known = ["config", *(name for options in groups.values() for option in options for name in option.names)]
    _refuse_mistakes(parser, typed, known)


def _refuse_mistakes(parser: argparse.ArgumentParser, typed: list[str], known: list[str]) -> None:
    if unknown := [name for name in typed if not any(one.startswith(name) for one in known)]:
        parser.error(f"unrecognized arguments: {' '.join(f'--{name}' for name in unknown)}")
    missing = [f"--{name}" for name in NEEDED if not any(name.startswith(one) for one in typed)]
    if missing and "config" not in typed:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _help_parser(groups: dict[str, list[Option]], about: str, is_complete: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-jacobi train",
        usage="hf-jacobi train --model_name_or_path MODEL --train_dataset DATA [options]\n"
        "       hf-jacobi train --config FILE [options]",
        description=about,
        epilog=None
        if is_complete
        else "More options need the extra 'train': pip install '.[train]' in a clone of hf_jacobi.",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file of options; options on the command line override it"
    )
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for option in options:
            option.add_to(group)
    return parser
