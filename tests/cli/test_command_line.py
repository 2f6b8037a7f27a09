"""The command line: answers without slow imports, exit statuses, and errors in one sentence."""

import errno
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError

import hf_jacobi
from hf_jacobi import cli
from hf_jacobi.cli import COMMANDS, demo, train
from hf_jacobi.decoding.errors import MissingFile, UsageError


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
    """The modules that a program imported, and its output."""
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
def test_help_and_usage_errors_import_no_slow_package(typed):
    modules, printed = modules_after(RUN, *typed)
    assert not modules & SLOW
    assert len(modules) < 300, "mostly Python's own modules"
    assert typed == ["--version"] or "usage: hf-jacobi" in printed


@pytest.mark.parametrize(
    "typed",
    [
        "bench ./nowhere",
        "collect --dataset nowhere.jsonl --output-dir out",
        "demo --model ./nowhere",
        "pack --trajectories ./nowhere --output-dir out",
        "recipe nowhere.yaml --output-dir out",
    ],
)
def test_a_wrong_name_is_refused_before_a_slow_package_is_imported(typed):
    modules, printed = modules_after(RUN, *typed.split())
    assert not modules & SLOW
    assert "nowhere" in printed and "Traceback" not in printed


def test_only_the_used_parts_of_the_package_are_imported():
    program = "import json, sys, hf_jacobi; {}; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    modules, _ = modules_after(program.format("hf_jacobi.__version__"))
    assert not modules & SLOW
    modules, _ = modules_after(program.format("hf_jacobi.enable"))
    assert {"torch", "transformers"} <= modules and not modules & {"datasets", "trl", "peft", "matplotlib"}


def test_all_public_names_are_listed_before_they_are_imported():
    program = """
import json, sys, hf_jacobi
missing = [name for name in [*hf_jacobi.__all__, "__version__"] if name not in dir(hf_jacobi)]
print(json.dumps(["torch" in sys.modules, *missing]), file=sys.stderr)
"""
    assert modules_after(program)[0] == {False}
    for name in hf_jacobi.__all__:
        assert getattr(hf_jacobi, name) is getattr(hf_jacobi, name)
        assert name in vars(hf_jacobi), "later uses find it without an import"
    assert hf_jacobi.decoding.enable is hf_jacobi.enable
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_jacobi.no_such_name  # noqa: B018


def test_a_name_that_needs_an_extra_names_it(monkeypatch):
    monkeypatch.delitem(vars(hf_jacobi), "plots", raising=False)
    monkeypatch.delitem(sys.modules, "hf_jacobi.evaluation.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="the extra 'eval'"):
        hf_jacobi.plots  # noqa: B018


def test_eval_without_the_harness_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["eval", "model", "--tasks", "gsm8k"]) == 2
    assert "lm_eval, from the extra 'harness': pip install '.[harness]'" in capsys.readouterr().err


def test_every_command_names_the_extra_that_it_lacks(tmp_path):
    program = """
import sys
from hf_jacobi.cli import main
for package in sys.argv[1].split(","):
    sys.modules[package] = None
for typed in sys.argv[2:]:
    assert main(typed.split()) == 2, typed
"""
    (tmp_path / "p.txt").write_text("w3")
    (tmp_path / "r.yaml").write_text("model: m")
    commands = {
        "collect --model m --dataset p.txt --output-dir o": ("datasets", "train"),
        "pack --trajectories p.txt --output-dir o": ("datasets", "train"),
        "train --model_name_or_path m --train_dataset p --output_dir o": ("trl", "train"),
        "recipe r.yaml --output-dir o": ("datasets", "train"),
        "bench m --prompts p.txt": ("datasets", "eval"),
        "tune m --dry-run --prompts p.txt": ("datasets", "eval"),
        "eval m --tasks gsm8k": ("lm_eval", "harness"),
        "serve m": ("fastapi", "serve"),
    }
    blocked = ",".join({package for package, _ in commands.values()})
    done = subprocess.run(
        [sys.executable, "-c", program, blocked, *commands], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for line, (typed, (package, extra)) in zip(done.stderr.splitlines(), commands.items(), strict=True):
        assert line.startswith(f"hf-jacobi {typed.split()[0]}: ") and f" needs {package}, " in line
        assert line.endswith(f"from the extra {extra!r}: pip install '.[{extra}]' in a clone of hf_jacobi")


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
        "ngrams": ["--trajectories", "t", "--output-dir", "o"],
        "eval": ["--tasks", "t"],
        "push": ["m", "r"],
        "recipe": ["r.yaml", "--output-dir", "o"],
    }
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, *needed.get(command, []), "--no-such-option"])
    said = capsys.readouterr().err
    assert said.startswith(f"usage: hf-jacobi {command} ") and "unrecognized arguments: --no-such-option" in said


def test_a_closed_pipe_ends_the_command_without_a_message():
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


def ends_with(monkeypatch, error):
    """Makes the commands `demo` and `train` raise an error."""

    def run(arguments):
        raise error

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(train, "run", run)


FAULTS = [KeyError("a"), AttributeError("b"), ValueError("c"), RuntimeError("d"), TypeError("e"), ImportError("f")]
FAULTS += [
    OSError("no file is named"),
    AssertionError(),
    ModuleNotFoundError("No module named 'h'", name="h"),
    ZeroDivisionError(),
    UnicodeDecodeError("utf-8", b"", 0, 1, "g"),
]
MISTAKES = {
    UsageError("a sentence"): "a sentence",
    MissingFile("there is no file x"): "there is no file x",
    FileNotFoundError(errno.ENOENT, "No such file or directory", "in/x.json"): "in/x.json: No such file or directory",
    PermissionError(errno.EACCES, "Permission denied", "x.json"): "x.json: Permission denied",
    IsADirectoryError(errno.EISDIR, "Is a directory", "x"): "x: Is a directory",
    OSError(errno.ENOSPC, "No space left on device"): "No space left on device",
    HfHubHTTPError("503 Server Error", response=SimpleNamespace(status_code=503, headers={}, request=None)): "the Hub",
    ConnectionError("[Errno -2] Name or service not known"): "cannot reach the Hub",
}


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_bug_keeps_its_traceback(error, monkeypatch, capsys):
    ends_with(monkeypatch, error)
    with pytest.raises(type(error)):
        cli.main(["demo"])
    assert "hf-jacobi demo:" not in capsys.readouterr().err


def test_a_bug_ends_the_program_with_status_1_and_a_traceback():
    program = """
import sys
from hf_jacobi import cli
from hf_jacobi.cli import demo
def run(arguments):
    {}["a bug"]
demo.run = run
sys.exit(cli.main(["demo"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr and "KeyError: 'a bug'" in done.stderr


@pytest.mark.parametrize(("error", "said"), MISTAKES.items(), ids=lambda value: type(value).__name__)
def test_an_error_that_the_user_can_fix_is_one_sentence(error, said, monkeypatch, capsys):
    ends_with(monkeypatch, error)
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hf-jacobi demo: ") and said in err and "Traceback" not in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "typed",
    [["--debug", "demo"], ["demo", "--debug"], ["--debug", "train", "--x", "y"], ["train", "--debug", "--x", "y"]],
)
def test_debug_shows_the_traceback_of_a_user_error(typed, monkeypatch, capsys):
    ends_with(monkeypatch, UsageError("a sentence"))
    assert cli.main(typed) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith(f"hf-jacobi {'train' if 'train' in typed else 'demo'}: a sentence\n")


def test_the_debug_option_of_transformers_is_passed_on(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(train, "run", lambda arguments: seen.append(arguments.rest) or 0)
    for typed, left in (
        (["--debug", "underflow_overflow"], ["--debug", "underflow_overflow"]),
        (["--debug=underflow_overflow"], ["--debug=underflow_overflow"]),
        (["--config", "x.yaml", "--debug"], ["--config", "x.yaml"]),
    ):
        assert cli.main(["train", *typed]) == 0
        assert seen.pop() == left


def test_a_command_does_not_see_the_debug_option(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "run", lambda arguments: seen.append(vars(arguments)) or 0)
    assert cli.main(["--debug", "demo"]) == cli.main(["demo"]) == 0
    assert seen[0] == seen[1] and "debug" not in seen[0]


@pytest.mark.parametrize(("category", "count"), [(FutureWarning, 0), (UserWarning, 1)])
def test_what_other_packages_will_remove_is_not_reported(category, count, monkeypatch, recwarn):
    monkeypatch.setattr(demo, "run", lambda _: warnings.warn("of another package", category, stacklevel=1) or 0)
    assert cli.main(["demo"]) == 0
    assert len([warning for warning in recwarn if str(warning.message) == "of another package"]) == count


def test_an_interrupt_is_not_reported_as_an_error(monkeypatch, capsys):
    ends_with(monkeypatch, KeyboardInterrupt())
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding(encoding):
    program = """
import sys
from hf_jacobi import cli
from hf_jacobi.cli import demo
from hf_jacobi.decoding.errors import UsageError
def run(arguments):
    print("caf\\u00e9 \\u4e2d \\U0001f600 \\udc80")
    raise UsageError("\\u4e2d")
demo.run = run
sys.exit(cli.main(["demo"]))
"""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stdout.startswith("caf\u00e9 \u4e2d \U0001f600 ".encode(encoding, "backslashreplace"))
    assert done.stdout.endswith(b"\\udc80\n")


def test_an_error_after_a_progress_bar_starts_on_its_own_line(monkeypatch, capsys):
    from tqdm import tqdm

    bars = []

    def run(arguments):
        bars.append(tqdm(range(9), file=sys.stderr))
        bars[0].update()
        raise UsageError("a sentence")

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert "1/9" in err and "\nhf-jacobi demo: a sentence\n" in err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_a_stream_can_be_closed(closed):
    done = subprocess.run(f"{sys.executable} -m hf_jacobi {closed}", shell=True, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, "the status of the command without arguments"
