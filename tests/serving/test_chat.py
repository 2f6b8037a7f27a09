"""`hf-jacobi chat --terminal`: answers piece by piece, and their figures."""

from __future__ import annotations

import builtins
import json
import re

import pytest
import torch
from models import tiny_tokenizer, trained_model

from hf_jacobi import cli
from hf_jacobi.cli import chat as command
from hf_jacobi.cli.chat import _figures
from hf_jacobi.cli.models import MINIATURE
from hf_jacobi.serving.chat import Conversation, Stopped
from hf_jacobi.serving.server import Served


PROMPTS = json.loads((MINIATURE / "prompts.json").read_text(encoding="utf-8"))


@pytest.fixture
def served():
    model = trained_model()
    return Served("tiny", model, model, tiny_tokenizer())


def answer(served, decoding: str, show=lambda text, tokens: None, length: int = 40):
    conversation = Conversation(served, length)
    conversation.ask("t5 t6 t7")
    return conversation.answer(decoding, show)


def test_text_comes_with_the_tokens_of_each_forward(served):
    shown = {"ar": [], "jacobi": []}
    answers = {way: answer(served, way, lambda *said, way=way: shown[way].append(said)) for way in shown}
    assert answers["ar"].text == answers["jacobi"].text and answers["ar"].text
    for way, found in answers.items():
        assert "".join(text for text, _ in shown[way]) == found.text
        assert [tokens for _, tokens in shown[way]] == found.forwards
    assert answers["ar"].tokens_per_forward == 1 < answers["jacobi"].tokens_per_forward
    inputs = served.encode([{"role": "user", "content": "t5 t6 t7"}])
    settings = {"decoding": "jacobi", "max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    stats = served.model.generate(**inputs, **settings).jacobi_stats
    assert answers["jacobi"].forwards == stats.accepted_per_forward and len(stats.accepted_per_forward) > 5
    assert answers["ar"].tokens == answers["jacobi"].tokens
    assert answers["jacobi"].tokens_per_second > 0


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
def test_an_answer_that_is_broken_off_keeps_what_came(served, error):
    def show(text, tokens):
        if len(said) == 3:
            raise error
        said.append(text)

    said = []
    found = answer(served, "jacobi", show)
    assert found.text.startswith("".join(said)) and len(found.forwards) == 4 and found.stopped
    whole = answer(served, "jacobi")
    assert whole.text.startswith(found.text) and not whole.stopped, "the next answer is complete"
    assert "stopped" in _figures([whole, found]) and "text" not in _figures([whole, found])
    assert "same text" in _figures([whole, whole])


def test_a_second_turn_knows_the_first(served):
    conversation = Conversation(served, 8)
    conversation.ask("t5")
    first = conversation.answer("jacobi", lambda *_: None)
    conversation.keep(first)
    conversation.ask("t6")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "user"]
    second = conversation.answer("jacobi", lambda *_: None)
    torch.manual_seed(0)
    inputs = served.encode(conversation.messages)
    tokens = served.model.generate(**inputs, decoding="ar", max_new_tokens=8, do_sample=False)
    expected = served.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert second.text == expected


def test_characters_of_several_tokens_come_whole(served, monkeypatch):
    pieces = {0: "", 1: "a", 2: "a\ufffd", 3: "a\ufffd", 4: "aé", 5: "aéb"}
    monkeypatch.setattr(served.tokenizer.__class__, "decode", lambda self, tokens, **_: pieces[min(len(tokens), 5)])
    said = []
    found = answer(served, "ar", lambda *one: said.append(one), length=5)
    assert [text for text, _ in said] == ["a", "", "", "é", "b"] and found.text == "aéb"


def typed(monkeypatch, *lines: str):
    rest = iter(lines)

    def read(prompt=""):
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)


def test_the_terminal(monkeypatch, capsys):
    """With the miniature and its examples; an invalid message ends the answer, not the chat."""
    typed(monkeypatch, "/9", "x " * 3000, "/1", "/clear", PROMPTS[1])
    threads = torch.get_num_threads()
    try:
        assert cli.main(["chat", "--terminal", "--compare"]) == 0
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "/1 to /4" in said and "2048 positions" in said
    assert said.count("same text") == 2 and said.count("Answer: 12") == 2
    per_forward = [float(found) for found in re.findall(r"([\d.]+)\sper\sforward", said)]
    assert all(found > 4 for found in per_forward) and len(per_forward) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one"], "one"),
        (["one\\", "two\\", ""], "one\ntwo\n"),
        ([""], None),
        (["one\\"], None),
    ],
)
def test_a_backslash_continues_a_message(lines, message, monkeypatch):
    typed(monkeypatch, *lines)
    assert command._read() == message


def test_forwards_are_told_apart_by_shade():
    shades = [next((style for least, style in command.SHADES if tokens >= least), "") for tokens in (1, 2, 4, 8, 16)]
    assert len(set(shades)) == 5 and shades[0] == ""
