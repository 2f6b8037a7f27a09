"""A Space that runs `hf-jacobi chat`: what is written, that it runs, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from importlib.util import find_spec

import pytest
from checkpoints import FakeHub, adapter, change, checkpoint, files_of

from hf_jacobi import cli
from hf_jacobi.decoding.errors import UsageError
from hf_jacobi.hub import space
from hf_jacobi.hub.space import publish_space


@pytest.fixture
def written(tmp_path):
    """A Space of a folder."""
    change(checkpoint(tmp_path / "model") / "generation_config.json", decoding="jacobi")
    publish_space(tmp_path / "model", "someone/mine", tmp_path / "space", dry_run=True, tell=lambda line: None)
    return tmp_path / "space"


def test_what_a_space_holds(written):
    files = files_of(written)
    assert {"app.py", "requirements.txt", "README.md", "Dockerfile", "models/mine/model.safetensors"} <= files
    assert {"hf_jacobi/serving/page/index.html", "hf_jacobi/cli/chat.py", "hf_jacobi/__init__.py"} <= files
    assert "hf_jacobi/hub/card.md.jinja" in files, "without it, a Space cannot render cards"
    assert not {file for file in files if "checkpoints" in file or "__pycache__" in file}
    header = (written / "README.md").read_text().split("---")[1]
    assert "sdk: docker" in header and "app_port: 7860" in header and "title: mine" in header
    assert json.loads((written / "models/mine/generation_config.json").read_text())["decoding"] == "jacobi"
    text = "".join(file.read_text() for file in written.glob("*") if file.is_file())
    assert str(written.parent) not in text, "no path of this machine"


def test_what_a_space_needs_is_what_the_extra_asks_for():
    extra = (space.PACKAGE.parents[1] / "setup.py").read_text().partition('"serve": [')[2].partition("],")[0]
    assert set(re.findall(r'"(.+?)"', extra)) - {"rich>=13"} == set(space.NEEDED)


@pytest.mark.serve
def test_the_written_app_runs(written, tmp_path):
    """It uses only the package source in the Space."""
    assert find_spec("fastapi")
    probe = "import hf_jacobi; print(hf_jacobi.__file__)"
    environment = os.environ | {"PORT": "0", "PYTHONPATH": os.pathsep.join([str(written), *filter(None, sys.path)])}
    settings = {"env": environment, "text": True, "cwd": tmp_path, "stdout": subprocess.PIPE}
    place = subprocess.run([sys.executable, "-c", probe], **settings)
    assert place.stdout.startswith(str(written))
    command = [sys.executable, str(written / "app.py")]
    with subprocess.Popen(command, **settings) as app:
        try:
            said = next(line for line in iter(app.stdout.readline, "") if "http" in line)
            address = re.search(r"http://\S+", said)[0]
            about = json.loads(urllib.request.urlopen(f"{address}/page/about").read())
            body = {"messages": [{"role": "user", "content": "t5 t6"}], "max_tokens": 4}
            request = urllib.request.Request(
                f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            answer = json.loads(urllib.request.urlopen(request).read())
        finally:
            app.terminate()
    assert about["model"] == "models/mine" and answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("model", "line"), [("someone/model", 'MODEL = ["someone/model"]'), ("miniature", "MODEL = []")]
)
def test_a_model_on_the_hub_and_the_miniature_need_no_folder(tmp_path, model, line):
    said = []
    publish_space(model, "someone/mine", tmp_path / "space", dry_run=True, tell=said.append)
    assert line in (tmp_path / "space" / "app.py").read_text()
    weights = {file for file in files_of(tmp_path / "space") if file.endswith(".safetensors")}
    assert weights == ({"hf_jacobi/checkpoints/miniature/model.safetensors"} if model == "miniature" else set())
    assert ("models:\n- someone/model" in (tmp_path / "space" / "README.md").read_text()) == (model != "miniature")
    assert model in said[-1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "./no-such-folder"}, "there is no folder"),
        ({"model": ""}, "`model` is empty"),
        ({"repo_id": "mine"}, "does not name a user"),
    ],
)
def test_bad_input_is_refused(tmp_path, given, said):
    settings = {"model": "miniature", "repo_id": "someone/mine", "output_dir": tmp_path / "space"} | given
    with pytest.raises(UsageError, match=said):
        publish_space(**settings, dry_run=True, tell=lambda line: None)
    assert not (tmp_path / "space").exists()


def test_a_dry_run_without_a_folder_only_says_what_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["push", "miniature", "someone/mine", "--space", "--dry-run"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert "app.py" in first and last.startswith("nothing was pushed;") and not list(tmp_path.iterdir())


def test_an_adapter_on_a_model_of_this_machine_is_refused(tmp_path):
    base = checkpoint(tmp_path / "base")
    adapter(tmp_path / "adapter", str(base))
    with pytest.raises(UsageError, match="not on the Hub"):
        publish_space(tmp_path / "adapter", "someone/mine", tmp_path / "space", dry_run=True, tell=lambda line: None)


class Spaces(FakeHub):
    """A fake Hub for Spaces."""

    def create_repo(self, repo_id, **settings):
        self.made = (repo_id, settings["repo_type"], settings["space_sdk"])

    def upload_folder(self, folder_path, **settings):
        self.pushed = settings["repo_type"], files_of(folder_path)
        return "https://hub/commit"


def test_a_space_is_made_and_pushed(monkeypatch, capsys):
    hub = Spaces(models=("someone/base",))
    monkeypatch.setattr(space, "HfApi", hub)
    assert cli.main(["push", "someone/base", "someone/mine", "--space"]) == 0
    assert hub.made == ("someone/mine", "space", "docker")
    assert hub.pushed[0] == "space" and "app.py" in hub.pushed[1]
    assert "pushed: https://hub/commit" in capsys.readouterr().out
    assert cli.main(["push", "someone/unknown", "someone/mine", "--space"]) == 2
    assert "there is no model someone/unknown" in capsys.readouterr().err
    assert cli.main(["push", "miniature", "someone/mine", "--space", "--tokenizer", "x"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
