"""`hf-jacobi bench` on a tiny checkpoint."""

import argparse
import json

import pytest
from models import tiny_model, tiny_tokenizer

from hf_jacobi import cli
from hf_jacobi.cli.options import Prompts, add_prompts


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_bench_writes_figures_a_table_and_a_picture(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w5 w{n} w7"}) + "\n" for n in range(6, 9)))
    command = ["bench", checkpoint, "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "8"]
    command += ["--batch-sizes", "1", "3", "--config", '{"block_size": 4}', "--attention", "eager"]
    command += ["--output", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    assert cli.main(command) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [row["batch_size"] for row in report["results"]] == [1, 1, 1, 3, 3]
    assert report["setup"]["attention"] == "eager"
    assert (tmp_path / "bench.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "batches of 3" in out and "\nJacobi, block_size=4 " in out
    assert max(map(len, out.partition("one at a time")[2].splitlines())) <= 80


def test_bad_settings_are_refused_before_the_model_is_loaded(capsys):
    for text, message in (("{", "Expecting"), ('{"block": 3}', "unknown settings"), ("3", "JacobiConfig or a dict")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["bench", "nowhere", "--config", text])
        assert message in capsys.readouterr().err


def test_what_would_fail_at_the_end_fails_at_once(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n \n")
    assert cli.main(["bench", checkpoint, "--prompts", str(tmp_path / "prompts.txt")]) == 2
    assert "holds no prompt" in capsys.readouterr().err
    assert cli.main(["bench", checkpoint, "--plot", str(tmp_path / "bench.xyz")]) == 2
    assert "bench.xyz is no picture" in capsys.readouterr().err


def test_blank_lines_are_no_prompts_and_text_may_be_a_users_message(tmp_path):
    (tmp_path / "prompts.txt").write_text("w5 w6\n\nw7\n")
    parser = argparse.ArgumentParser()
    add_prompts(parser, count=4)
    read = ["--prompts", str(tmp_path / "prompts.txt")]
    tokenizer = tiny_tokenizer()
    assert Prompts(parser.parse_args(read)).encode(tokenizer) == [
        tokenizer(text)["input_ids"] for text in ("w5 w6", "w7")
    ]
    chat = Prompts(parser.parse_args([*read, "--as-chat"])).encode(tokenizer)
    message = [{"role": "user", "content": "w7"}]
    assert chat[1] == list(tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"])
