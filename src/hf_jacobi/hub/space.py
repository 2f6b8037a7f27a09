"""`publish_space`: the chat page as a Space on the Hub, which runs `hf-jacobi chat`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from ..decoding.compat import requirement
from ..decoding.errors import MissingFile, UsageError
from ..decoding.files import read_json
from .network import talking_to_the_hub
from .places import is_on_hub
from .publish import check_repo, moved, publish, target_of


PACKAGE = Path(__file__).parents[1]
SOURCE = ("*.py", "*.jinja", "page/*")  # the files of this package that are published
MINIATURE = "miniature"  # the only checkpoint of this package that is published, if the Space shows it
PORT = 7860
# As in the extra `serve` of setup.py; `test_space.py` compares the two.
NEEDED = ("fastapi>=0.110", "starlette>=0.36", "uvicorn>=0.29", "openai>=1.98.0", "pydantic>=2", "peft>=0.19")
README = """---
title: {title}
emoji: 🧵
colorFrom: green
colorTo: gray
sdk: docker
app_port: {port}
{models}---

Chat with {shown}, which generates many tokens per forward. The page gives tokens from the same forward one colour and,
on request, shows autoregressive decoding (one token per forward) beside it. This Space was created by
`hf-jacobi push --space`; `hf_jacobi/` contains the source of that package.
"""
DOCKERFILE = """FROM python:3.12-slim
RUN useradd -m -u 1000 user
USER user
ENV HOME=/home/user PATH=/home/user/.local/bin:$PATH
WORKDIR /home/user/app
COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --user -r requirements.txt
COPY --chown=user . .
EXPOSE {port}
CMD ["python", "app.py"]
"""
REQUIREMENTS = """# torch without CUDA; remove this line on a GPU
--extra-index-url https://download.pytorch.org/whl/cpu
torch>=2.6
{needed}
"""
APP = '''"""A chat page that shows which tokens came from the same forward."""

import os
import sys
from pathlib import Path

from hf_jacobi.cli import main


MODEL = {model}

if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    sys.exit(main(["chat", *MODEL, "--no-browser", "--host", "0.0.0.0", "--port", os.environ.get("PORT", "{port}")]))
'''


def publish_space(
    model: str | Path,
    repo_id: str,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    tell: Callable[[str], Any] = print,
) -> str:
    """
    Pushes a Space that runs `hf-jacobi chat`: a Docker Space with the source of this package and, unless the model is
    on the Hub, the model.

    Args:
        model (`str` or `Path`): the folder of a model or an adapter, a Hub id, or `"miniature"`.
        repo_id (`str`): `"user/name"` of the Space; created if it does not exist.
        output_dir (*optional*): where to keep the folder that is pushed; a new or empty folder.
        dry_run (`bool`): write the folder and report its files without pushing it.
        private (`bool`, *optional*): whether a new Space is private.
        token (*optional*): the Hub token; by default that of the login.
        tell: called with each line of the report before the push.

    Returns:
        The URL of the commit; for a dry run `output_dir`, or `""` without one.

    Raises:
        `ValueError`: `publish` would refuse the model, or it is neither a folder nor a possible Hub id.
    """
    check_repo(repo_id)
    target = target_of(output_dir)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(dir=target and target.parent) as place:
        folder = Path(place) / "space"
        write_space(folder, model, repo_id, tell)
        if not dry_run:
            _check_model(api, folder, model)
        if target is not None:
            folder = moved(folder, target)
        return str(target or "") if dry_run else _push(api, repo_id, folder, private)


def write_space(folder: Path, model: str | Path, repo_id: str, tell: Callable[[str], Any]) -> None:
    """Writes the files of a Space to a new folder; the other arguments are those of `publish_space`."""
    name = repo_id.partition("/")[2]
    local = Path(model).expanduser().is_dir()
    if not str(model).strip():
        raise UsageError("`model` is empty: pass a name (is a variable unset?).")
    if not local and str(model) != MINIATURE and not is_on_hub(str(model)):
        raise MissingFile(f"there is no folder {model}, and it is not a Hub id: pass the folder or id of a model.")
    folder.mkdir()
    shown, typed, models = str(model), [str(model)], ""
    if local:
        shown, typed = name, [f"models/{name}"]
        (folder / "models").mkdir()
        publish(model, repo_id, output_dir=folder / "models" / name, dry_run=True, tell=tell)
        _check_base(folder / "models" / name)
    elif str(model) == MINIATURE:
        shown, typed = "a model of 3.5 million parameters", []
    else:
        models = f"models:\n- {model}\n"
    _copy_source(folder / PACKAGE.name, with_miniature=not typed)
    files = {
        "README.md": README.format(title=name, port=PORT, models=models, shown=shown),
        "Dockerfile": DOCKERFILE.format(port=PORT),
        "requirements.txt": REQUIREMENTS.format(needed="\n".join((requirement(), *NEEDED))),
        "app.py": APP.format(model=json.dumps(typed), port=PORT),
    }
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    tell(f"the Space {repo_id}: {', '.join(files)}, the source of hf_jacobi, and {_model_in(typed, local)}")


def _model_in(typed: list[str], local: bool) -> str:
    if not typed:
        return "the miniature"
    return typed[0] if local else f"{typed[0]} from the Hub (if it is private, add the secret HF_TOKEN to the Space)"


def _check_base(folder: Path) -> None:
    """Refuses an adapter whose base model is only on this machine; `publish` has removed its name."""
    file = folder / "adapter_config.json"
    if file.exists() and not read_json(file).get("base_model_name_or_path"):
        raise UsageError(
            "the adapter's base model is not on the Hub, where the Space would look for it: publish that first, and "
            "name its repository in adapter_config.json (`base_model_name_or_path`)."
        )


def _copy_source(folder: Path, with_miniature: bool) -> None:
    files = {file for pattern in SOURCE for file in PACKAGE.rglob(pattern) if "checkpoints" not in file.parts}
    if with_miniature:
        files |= set((PACKAGE / "checkpoints" / MINIATURE).iterdir())
    for file in files:
        copy = folder / file.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _check_model(api: HfApi, folder: Path, model: str | Path) -> None:
    """Refuses, before the push, a Hub id that does not exist."""
    if (folder / "models").exists() or str(model) == MINIATURE:
        return
    with talking_to_the_hub():
        try:
            api.model_info(str(model))
        except RepositoryNotFoundError:
            raise UsageError(
                f"there is no model {model} on the Hub: check the name, and that your token has access to it."
            ) from None


def _push(api: HfApi, repo_id: str, folder: Path, private: bool | None) -> str:
    with talking_to_the_hub():
        api.create_repo(repo_id, repo_type="space", space_sdk="docker", private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo_id,
                repo_type="space",
                folder_path=folder,
                commit_message="Upload with hf_jacobi",
                delete_patterns=[f"{PACKAGE.name}/*", "models/*"],  # written by an earlier push
            )
        )
