"""Checkpoints on disk, and a fake Hub to push them to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from models import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model


def checkpoint(folder: Path, **settings) -> Path:
    """A folder of a model and its tokenizer, as `save_pretrained` writes them."""
    tiny_model().save_pretrained(folder, **settings)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapter(folder: Path, base) -> Path:
    """A folder of an adapter that names its base."""
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    change(folder / "adapter_config.json", base_model_name_or_path=base)
    return folder


def change(file: Path, **values) -> None:
    """Updates values in a JSON file, which is created if necessary."""
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def files_of(folder) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if not file.is_dir()}


def answer(status: int, kind=HfHubHTTPError):
    """An error response of the Hub, as huggingface_hub raises it."""
    return kind(
        f"{status} for url https://huggingface.co",
        response=SimpleNamespace(status_code=status, headers={}, request=None),
    )


class FakeHub:
    """The part of the Hub's API that `publish` uses."""

    def __init__(self, files=(), models=("someone/base",)):
        self.files, self.deleted, self.models = list(files), None, models
        self.pushed = None

    def __call__(self, token=None):
        return self

    def whoami(self):
        return {"name": "someone"}

    def model_info(self, repo_id):
        if repo_id not in self.models:
            raise answer(404, RepositoryNotFoundError)

    def create_repo(self, repo_id, **settings):
        pass

    def list_repo_files(self, repo_id):
        return self.files

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        self.deleted = set(delete_patterns)
        self.pushed = files_of(folder_path)
        return "commit"
