"""Prompts as users have them: tools, template settings, token ids, and bad prompts."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from models import tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from hf_jacobi import UsageError
from hf_jacobi.cli import main
from hf_jacobi.trajectories import collect_trajectories, read_report
from hf_jacobi.trajectories.encoding import encode_messages, encode_text
from hf_jacobi.trajectories.prompts import digest_of, encode_prompt, open_prompts


TEMPLATE = (
    "{% if tools %}{% for tool in tools %}w9 {% for key in tool['function'] %}w8 {% endfor %}{% endfor %}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}w7 {% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m['content'] }} {% for key in m %}{% if key not in ('role', 'content') %}w6 {% endif %}{% endfor %}"
    "{% endfor %}"
)
ASKED = [{"role": "user", "content": "w3"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def tokenizer(template: str = TEMPLATE, before: str = "", after: str = ""):
    """A tokenizer that can put special tokens around a text."""
    found = tiny_tokenizer()
    found.chat_template = template
    if before or after:
        special = [("<s>", 1), ("</s>", 2), ("<pad>", 0)]
        single = f"{before} $A {after}".strip()
        found._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return found


def collect(prompts, using=None, model=None, **settings):
    settings = {"progress": False} | settings
    return collect_trajectories(model or tiny_model(), using or tokenizer(), prompts, 4, 8, **settings)


def ids_of(*arguments, **settings):
    return collect(*arguments, **settings)["prompt_ids"][:]


# Tools and settings


def test_tools_reach_the_template():
    assert ids_of([{"messages": ASKED, "tools": [TOOL]}]) == [[9, 8, 8, 3]]
    assert ids_of([{"messages": ASKED, "tools": json.dumps([TOOL])}]) == [[9, 8, 8, 3]], "as JSON"
    assert ids_of([{"messages": ASKED, "tools": [json.dumps(TOOL)]}]) == [[9, 8, 8, 3]], "each as JSON"
    for nothing in (None, [], "", "[]"):
        assert ids_of([{"messages": ASKED, "tools": nothing}]) == [[3]]
    assert ids_of([{"prompt": "w3", "tools": [TOOL]}], as_chat=True) == [[9, 8, 8, 3]]


def test_what_arrow_fills_in_does_not_reach_the_template():
    wide = {"type": "function", "function": {"name": "g", "parameters": {"a": {"type": "b"}}, "strict": True}}
    answer = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    rows = [
        {"messages": ASKED, "tools": [TOOL]},
        {"messages": [*ASKED, answer, {"role": "tool", "content": "w4", "name": "f"}], "tools": [wide]},
    ]
    expected = [[9, 8, 8, 3], [9, 8, 8, 8, 3, 6, 4, 6]]
    assert ids_of(rows) == expected
    assert ids_of(Dataset.from_list(rows)) == expected


def test_settings_of_the_template_reach_it_and_those_of_a_row_take_precedence():
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    rows = [{"messages": ASKED, "chat_template_kwargs": own} for own in (None, off, on, json.dumps(on))]
    assert ids_of(rows) == [[3], [7, 3], [3], [3]]
    assert ids_of(rows, chat_template_kwargs=off) == [[7, 3], [7, 3], [3], [3]]
    assert ids_of(Dataset.from_list(rows[:3]), chat_template_kwargs=off) == [[7, 3], [7, 3], [3]]


def test_settings_that_are_for_something_else_are_refused():
    with pytest.raises(UsageError, match="drop tokenize, padding"):
        collect([{"messages": ASKED}], chat_template_kwargs={"tokenize": False, "padding": True})
    with pytest.raises(UsageError, match="must be a dictionary"):
        collect([{"messages": ASKED}], chat_template_kwargs="off")
    with pytest.raises(UsageError, match="are for messages, but prompt 0 is text"):
        collect(["w3"], chat_template_kwargs={"enable_thinking": False})


def test_settings_that_the_template_does_not_have_are_refused():
    with pytest.raises(UsageError, match="has no setting enable_thinkin: leave it out"):
        collect([{"messages": ASKED}], chat_template_kwargs={"enable_thinkin": False})


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_may_be_json(column):
    assert ids_of([{column: json.dumps(ASKED)}]) == [[3]]
    assert ids_of([{column: "w3"}]) == [[3]], "a text stays one"


def test_tools_and_settings_are_part_of_what_a_folder_was_begun_with(tmp_path):
    row = {"messages": ASKED, "tools": [TOOL]}
    collect([row], output_dir=tmp_path / "out")
    assert len(collect([row], output_dir=tmp_path / "out")) == 1
    with pytest.raises(UsageError, match="made from other data"):
        collect([{"messages": ASKED}], output_dir=tmp_path / "out")
    with pytest.raises(UsageError, match="chat_template_kwargs None, now"):
        collect([row], output_dir=tmp_path / "out", chat_template_kwargs={"enable_thinking": False})


# Special tokens


@pytest.mark.parametrize(
    ("before", "after", "text", "expected"),
    [
        ("<s>", "", "w4", [1, 4]),
        ("<s>", "", "<s> w4", [1, 4]),
        ("<s>", "", "<s>", [1]),
        ("<s>", "", "w4 <s>", [1, 4, 1]),
        ("<s>", "</s>", "<s> w4", [1, 4]),
        ("<s>", "</s>", "w4", [1, 4]),
        ("", "</s>", "w4", [4]),
        ("", "", "<s> w4", [1, 4]),
        ("<pad> <s>", "", "<pad> <s> w4", [0, 1, 4]),
        ("<pad> <s>", "", "<s> w4", [0, 1, 4]),
        ("<s>", "", "<s> <s> w4", [1, 1, 4]),
    ],
)
def test_a_text_that_has_its_special_tokens_does_not_get_them_again(before, after, text, expected):
    assert ids_of([text], tokenizer(before=before, after=after)) == [expected]


def test_a_rendered_text_is_what_its_messages_are():
    using = tokenizer("<s> {{ messages[0]['content'] }}", before="<s>")
    text = using.apply_chat_template(ASKED, tokenize=False)
    assert encode_text(using, text) == encode_messages(using, ASKED) == [1, 3]


def test_to_encode_a_prompt_takes_no_more_than_a_tokenizer():
    """The demo runs without `datasets`."""
    code = "import sys; sys.modules['datasets'] = None; import hf_jacobi.trajectories.encoding"
    subprocess.run([sys.executable, "-c", code], check=True)


# Token ids


@pytest.mark.parametrize("column", ["prompt", "prompt_ids", "input_ids"])
def test_token_ids_are_prompts(column):
    for ids in ([3, 4], np.array([3, 4]), (3, 4)):
        assert ids_of([{column: ids}]) == [[3, 4]]
    assert ids_of(Dataset.from_list([{column: [3, 4]}])) == [[3, 4]]


def test_lists_of_conversations_and_of_ids_are_prompts():
    assert ids_of([ASKED, [3, 4], "w5"]) == [[3], [3, 4], [5]]


# Bad prompts

BAD = [
    ({"messages": [{"role": "system", "content": "w3"}]}, "prompt 1: TemplateError: System role not supported"),
    ({"prompt": "bad \ud83d end"}, r"prompt 1: its text holds half a character, the lone surrogate '\ud83d'"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "prompt 1: its text holds half a character"),
    ({"messages": ASKED, "tools": ["\ud83d"]}, "prompt 1: its text holds half a character"),
    ({"messages": []}, "prompt 1 is empty"),
    ({"messages": None}, "prompt 1 is empty"),
    ({"prompt": " "}, "prompt 1 is empty"),
    ({"prompt": [3, 96]}, "prompt 1 holds token 96, but LlamaForCausalLM has only 96"),
    ({"prompt": [-1]}, "prompt 1 holds token -1"),
    ({"prompt": [3, 2.5]}, "prompt 1: a prompt must be text or a list of messages or of token ids"),
    ({"prompt": 3.5}, "prompt 1: a prompt must be text or a list of messages or of token ids"),
    ({"messages": ["w3"]}, "prompt 1: a prompt must be text or a list of messages or of token ids"),
    ({"messages": [{"role": "user", "content": 3}]}, "prompt 1: a message must be text or parts with a text"),
    ({"messages": ASKED, "tools": 3}, "prompt 1: its tools must be a list"),
    ({"messages": ASKED, "tools": "{bad"}, "prompt 1: its tools are text, but not JSON"),
    ({"messages": ASKED, "chat_template_kwargs": [1]}, "prompt 1: `chat_template_kwargs` must be a dictionary"),
    ({"messages": ASKED, "chat_template_kwargs": {"tokenize": False}}, "prompt 1: .*drop tokenize"),
    ({"prompt": "w3", "tools": [TOOL]}, "prompt 1: it is text, but has tools"),
    ({"prompt": "w3 " * 300}, "prompt 1 has 300 tokens, more than 248"),
    ({"other": "w3"}, r"prompt 1: none of the columns \['other'\] looks like a prompt"),
    ({"messages": ASKED, "tools": ["{bad"]}, "prompt 1: its tools are text, but not JSON"),
    ({"id": "seven", "prompt": 3}, "prompt seven: a prompt must be"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_prompt_is_named_skipped_and_counted_and_a_restart_goes_on(tmp_path, row, reason):
    rows = [{"prompt": "w3"}, row, {"prompt": "w4"}]
    with pytest.warns(UserWarning, match="1 of 3 prompts were left out: ") as caught:
        found = collect(rows, output_dir=tmp_path / "out", shard_size=2)
    assert found["prompt_ids"][:] == [[3], [4]]
    report = read_report(tmp_path / "out")
    assert report.empty_prompts + report.long_prompts + report.bad_prompts == 1 and report.prompts == 3
    (named,) = report.skipped
    assert reason in named or re.search(reason, named)
    assert any(named in str(warning.message) for warning in caught)
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.parquet"))]
    more = [*rows, {"prompt": "w5"}, {"prompt": "w6"}]
    with pytest.warns(UserWarning, match="1 of 5 prompts"):
        assert collect(more, output_dir=tmp_path / "out", shard_size=2)["prompt_ids"][:] == [[3], [4], [5], [6]]
    assert times[0] == (tmp_path / "out" / "trajectories-00000.parquet").stat().st_mtime_ns, "not done again"
    for settings in ({"output_dir": tmp_path / "out", "shard_size": 2}, {}):
        with pytest.raises(UsageError) as error:
            collect(rows if not settings else more, strict=True, **settings)
        assert named in str(error.value)


def test_a_prompt_that_strict_ended_at_can_be_mended(tmp_path):
    rows = [{"prompt": "w3"}, {"prompt": "w4"}, {"prompt": [96]}]
    with pytest.raises(UsageError, match="prompt 2 holds token 96"):
        collect(rows, output_dir=tmp_path / "out", shard_size=2, strict=True)
    rows[2] = {"prompt": [5]}
    assert len(collect(rows, output_dir=tmp_path / "out", shard_size=2, strict=True)) == 3


def test_not_one_good_prompt_is_an_error():
    with pytest.raises(UsageError, match="none of the 2 prompts can be used: prompt 0: TemplateError"):
        collect([{"messages": [{"role": "system", "content": "w3"}]}] * 2)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_before_any_work(tmp_path):
    using = tokenizer()
    using.add_tokens(["new", "newer"])
    assert ids_of(["w3"], using) == [[3]], "as long as no prompt has them"
    with pytest.raises(UsageError, match="prompt 2 holds token 97 of the tokenizer, but LlamaForCausalLM"):
        collect(["w3", "w4", "newer"], using, output_dir=tmp_path / "out", shard_size=1)
    assert not list((tmp_path / "out").glob("*.parquet"))
    model = tiny_model()
    model.resize_token_embeddings(98)
    assert ids_of(["newer"], using, model) == [[97]]
    using.add_special_tokens({"pad_token": "<more>"})
    model = tiny_model()
    model.generation_config.pad_token_id = None
    assert len(collect(["w3", "w4 w5 w6"], using, model)) == 2, "what pads is none of the model's tokens"


def test_a_column_that_no_row_has_is_refused_before_any_work(tmp_path):
    with pytest.raises(UsageError, match="has no column 'question'"):
        collect([{"prompt": "w3"}] * 2, prompt_column="question", output_dir=tmp_path / "out")
    with pytest.raises(UsageError, match="none of the columns"):
        collect(Dataset.from_dict({"a": ["w3"]}), output_dir=tmp_path / "out")
    assert not list(tmp_path.glob("out/*.parquet"))


def test_arguments_that_are_none_are_named():
    with pytest.raises(UsageError, match="there are no prompts"):
        collect([])
    with pytest.raises(UsageError, match=r"`seed` must be a whole number or None, got 1\.5"):
        collect(["w3"], seed=1.5)
    with pytest.raises(UsageError, match="`tokenizer` must be a tokenizer of transformers, got None"):
        collect_trajectories(tiny_model(), None, ["w3"], 4, 8)


def test_long_arrays_of_ids_are_told_apart_by_a_folder(tmp_path):
    """NumPy prints only the ends of a long array."""
    long = np.arange(1200) % 90 + 3
    other = long.copy()
    other[600] = 5
    rows = [[{"prompt_ids": ids}] for ids in (long, other)]
    assert digest_of(rows[0], None) != digest_of(rows[1], None)
    assert digest_of(rows[0], None) == digest_of([{"prompt_ids": long.tolist()}], None)


def test_a_broken_model_is_named_as_such():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"the model is broken: model\.layers\.0\.mlp\.up_proj\.weight"):
        collect(["w3"], model=model)


def test_scores_that_come_to_nan_are_named_as_such(tmp_path):
    model = tiny_model()
    model.model.norm.weight.data *= 1e30
    model.lm_head.weight.data *= 1e30
    with pytest.raises(UsageError, match=r"the scores of LlamaForCausalLM in torch\.float32 are NaN"):
        collect(["w3"], model=model, output_dir=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_infinite_scores_and_buffers_of_nan_are_named_as_such():
    model = tiny_model()
    model.lm_head.weight.data *= 1e38
    with pytest.raises(UsageError, match="are NaN or infinite, so there is no likeliest token"):
        collect(["w3"], model=model)
    model = tiny_model()
    model.model.rotary_emb.inv_freq[0] = float("nan")
    with pytest.raises(UsageError, match=r"model\.rotary_emb\.inv_freq holds NaN"):
        collect(["w3"], model=model)


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_samples_of_nan_are_refused(name):
    with pytest.raises(UsageError, match=f"`{name}` must be a finite number"):
        collect(["w3"], do_sample=True, **{name: float("nan")})


# From the shell


def test_the_command_takes_tools_and_settings_and_is_strict_if_asked(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"messages": ASKED, "tools": [TOOL]}, {"messages": [{"role": "system", "content": "w3"}], "tools": None}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["collect", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "p.jsonl")]
    command += ["--block-size", "4", "--max-new-tokens", "8", "--output-dir"]
    assert main([*command, str(tmp_path / "o"), "--chat-template-kwargs", '{"enable_thinking": false}']) == 0
    said = capsys.readouterr()
    assert "not encodable" in said.out and "System role not supported" in said.err
    assert open_prompts(tmp_path / "o")["prompt_ids"][:] == [[9, 8, 8, 7, 3]]
    assert main([*command, str(tmp_path / "strict"), "--strict"]) == 2
    assert "prompt 1: TemplateError: System role not supported" in capsys.readouterr().err
    for wrong in ("off", "[1]"):
        with pytest.raises(SystemExit):
            main([*command, str(tmp_path / "n"), "--chat-template-kwargs", wrong])
        assert "JSON" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_text(tmp_path):
    tokenizer = tiny_tokenizer()
    for name in ("one.txt", "folder/two.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes("\ufeffw5 w6\nw7\n".encode())
        rows = open_prompts(str(file if name == "one.txt" else file.parent))
        ids = [encode_prompt(number, row, None, tokenizer, False).ids for number, row in enumerate(rows)]
        assert ids == [[5, 6], [7]]


def test_a_file_of_blank_lines_is_empty(tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(UsageError, match=r"blank\.jsonl is empty"):
        open_prompts(str(tmp_path / "blank.jsonl"))
