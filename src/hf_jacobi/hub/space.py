"""`publish_space`: a chat page as a Space of the Hub, which runs `hf-jacobi chat`."""

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
from .publish import check_repo, publish, target_of


PACKAGE = Path(__file__).parents[1]
SOURCE = ("*.py", "page/*")  # of this package, what goes
MINIATURE = "miniature"  # of its checkpoints, the only one that goes, where it is what is shown
PORT = 7860
# As setup.py has them in its extra `serve`; `test_space.py` compares the two.
NEEDED = ("fastapi>=0.110", "starlette>=0.36", "uvicorn>=0.29", "openai>=1.98.0", "pydantic>=2", "peft>=0.19")
README = """---
title: {title}
emoji: 🧵
colorFrom: green
colorTo: gray
sdk: docker
app_port: {port}
{models}---

Chat with {shown}, many tokens per forward: the page colours the tokens that came out of the same forward, and writes
the answer one token at a time beside it on request. `hf-jacobi push --space` wrote this Space; `hf_jacobi/` is the
source of that package.
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
REQUIREMENTS = """# torch without CUDA; on a GPU leave this line out
--extra-index-url https://download.pytorch.org/whl/cpu
torch>=2.6
{needed}
"""
APP = '''"""A chat page that shows which tokens came out of the same forward."""

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
    Pushes a Space that runs `hf-jacobi chat`: a Docker Space, which holds the source of this package and, unless the
    model is on the Hub, the model.

    Args:
        model (`str` or `Path`): the folder of a model or an adapter, a name on the Hub, or `"miniature"`.
        repo_id (`str`): `"user/name"` of the Space; made if it is not there.
        output_dir (*optional*): where the folder that is pushed is written, empty or new. Needed for a dry run.
        dry_run (`bool`): write `output_dir` and push nothing.
        private (`bool`, *optional*): whether a new Space is private.
        token (*optional*): for the Hub; the one that is logged in if left out.
        tell: called with each line of what is to be said before the push.

    Returns:
        The address of the commit, or for a dry run the folder.

    Raises:
        `ValueError`: what `publish` refuses; a model that is neither here nor can be on the Hub.
    """
    check_repo(repo_id)
    target = target_of(output_dir, dry_run)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(dir=target and target.parent) as place:
        folder = Path(place) / "space"
        write_space(folder, model, repo_id, tell)
        if not dry_run:
            _check_model(api, folder, model)
        if target is not None:
            if target.exists():
                target.rmdir()
            folder = folder.rename(target)
        return str(folder) if dry_run else _push(api, repo_id, folder, private)


def write_space(folder: Path, model: str | Path, repo_id: str, tell: Callable[[str], Any]) -> None:
    """Writes the files of a Space into a new folder; the arguments are those of `publish_space`."""
    name = repo_id.partition("/")[2]
    local = Path(model).expanduser().is_dir()
    if not str(model).strip():
        raise UsageError("`model` is empty: give it a name (is a variable not set?).")
    if not local and str(model) != MINIATURE and not is_on_hub(str(model)):
        raise MissingFile(f"there is no folder {model}, nor can it be a name on the Hub.")
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
    tell(f"the Space {repo_id}: {', '.join(files)}, the source of hf_jacobi, and {_holds(typed, local)}")


def _holds(typed: list[str], local: bool) -> str:
    if not typed:
        return "the miniature"
    return typed[0] if local else f"{typed[0]} from the Hub (if that is private, give the Space a secret HF_TOKEN)"


def _check_base(folder: Path) -> None:
    """Refuses an adapter on a model that is on this machine alone, whose name `publish` takes out."""
    file = folder / "adapter_config.json"
    if file.exists() and not read_json(file).get("base_model_name_or_path"):
        raise UsageError(
            "the adapter goes onto a model that is not on the Hub, where the Space would look for it: publish that "
            "first, and name its repository in adapter_config.json (`base_model_name_or_path`)."
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
    """Refuses, before the push, a name that the Hub does not know."""
    if (folder / "models").exists() or str(model) == MINIATURE:
        return
    with talking_to_the_hub():
        try:
            api.model_info(str(model))
        except RepositoryNotFoundError:
            raise UsageError(f"there is no model {model} on the Hub, or your token may not see it.") from None


def _push(api: HfApi, repo_id: str, folder: Path, private: bool | None) -> str:
    with talking_to_the_hub():
        api.create_repo(repo_id, repo_type="space", space_sdk="docker", private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo_id,
                repo_type="space",
                folder_path=folder,
                commit_message="Upload with hf_jacobi",
                delete_patterns=[f"{PACKAGE.name}/*", "models/*"],  # what an earlier push wrote
            )
        )
