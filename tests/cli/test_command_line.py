"""`hf-jacobi` answers what is typed before it imports what takes seconds."""

import json
import subprocess
import sys

import pytest

import hf_jacobi
from hf_jacobi import cli
from hf_jacobi.cli import COMMANDS


SLOW = {"torch", "transformers", "numpy", "datasets", "trl", "peft", "huggingface_hub", "rich", "matplotlib", "tqdm"}
NAMES = [module.__name__.rpartition(".")[2] for module in COMMANDS]
RUN = """
import json, sys
from hf_jacobi.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def modules_after(program: str, *arguments: str) -> tuple[set[str], str]:
    """What is imported when a program has run, and what it printed."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1])), done.stdout + done.stderr


@pytest.mark.parametrize(
    "typed",
    [
        ["--version"],
        ["--help"],
        [],
        *([name, "--help"] for name in NAMES),
        ["bench", "--no-such-option"],
        ["bench", "--config", "{"],
        ["demo", "--max-new-tokens", "0"],
        ["train", "--no-such-option"],
        ["collect"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_an_answer_needs_no_library(typed):
    modules, printed = modules_after(RUN, *typed)
    assert not modules & SLOW
    assert len(modules) < 300, "Python's own"
    assert typed == ["--version"] or "usage: hf-jacobi" in printed


def test_the_package_is_imported_as_far_as_it_is_asked_for():
    program = "import json, sys, hf_jacobi; {}; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    modules, _ = modules_after(program.format("hf_jacobi.__version__"))
    assert not modules & SLOW
    modules, _ = modules_after(program.format("hf_jacobi.enable"))
    assert {"torch", "transformers"} <= modules and not modules & {"datasets", "trl", "peft", "matplotlib"}


def test_all_names_are_there_before_they_are_imported():
    program = """
import json, sys, hf_jacobi
missing = [name for name in [*hf_jacobi.__all__, "__version__"] if name not in dir(hf_jacobi)]
print(json.dumps(["torch" in sys.modules, *missing]), file=sys.stderr)
"""
    assert modules_after(program)[0] == {False}
    for name in hf_jacobi.__all__:
        assert getattr(hf_jacobi, name) is getattr(hf_jacobi, name)
        assert name in vars(hf_jacobi), "found once"
    assert hf_jacobi.decoding.enable is hf_jacobi.enable
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_jacobi.no_such_name  # noqa: B018


def test_a_name_that_needs_an_extra_says_which(monkeypatch):
    monkeypatch.delitem(vars(hf_jacobi), "plots", raising=False)
    monkeypatch.delitem(sys.modules, "hf_jacobi.evaluation.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hf_jacobi\[eval\]"):
        hf_jacobi.plots  # noqa: B018


def test_without_the_harness_eval_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["eval", "model", "--tasks", "gsm8k"]) == 2
    assert "lm_eval: pip install 'hf_jacobi[harness]'" in capsys.readouterr().err


def test_version_and_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"hf-jacobi {hf_jacobi.__version__}"
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in NAMES)


@pytest.mark.parametrize("command", sorted({*NAMES} - {"train"}))
def test_an_unknown_option_shows_the_usage_of_its_command(command, capsys):
    needed = {
        "collect": ["--dataset", "d", "--output-dir", "o"],
        "pack": ["--trajectories", "t", "--output-dir", "o"],
        "eval": ["--tasks", "t"],
        "push": ["m", "r"],
    }
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, *needed.get(command, []), "--no-such-option"])
    said = capsys.readouterr().err
    assert said.startswith(f"usage: hf-jacobi {command} ") and "unrecognized arguments: --no-such-option" in said


def test_a_reader_that_has_read_enough_ends_the_command_in_silence():
    program = """
import sys
from hf_jacobi import cli
from hf_jacobi.cli import demo
def run(arguments):
    for number in range(100_000):
        print(number)
    return 0
demo.run = run
sys.exit(cli.main(["demo"]))
"""
    done = subprocess.run(
        f"{sys.executable} -c '{program}' | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")
