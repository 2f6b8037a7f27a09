"""`hf-jacobi serve` as seen by clients: the official OpenAI client, `transformers chat`, and invalid requests."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from models import tiny_tokenizer, trained_model


pytestmark = pytest.mark.serve
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from hf_jacobi import cli  # noqa: E402
from hf_jacobi.cli import serve as command  # noqa: E402
from hf_jacobi.cli.models import MINIATURE  # noqa: E402
from hf_jacobi.decoding.errors import UsageError  # noqa: E402
from hf_jacobi.serving import listening, server  # noqa: E402


PROMPTS = json.loads((MINIATURE / "prompts.json").read_text(encoding="utf-8"))
AR = {"decoding": "ar"}
ENDLESS = "a b a b a b"  # the miniature continues this for a long time


def load(model=None, **settings):
    given = {"adapter": None, "dtype": "auto", "attention": None} | settings
    return command.load(Namespace(model=model, **given))[0]


@contextmanager
def running(served, **settings):
    """Runs a server; yields its port."""
    socket = listening.listen("127.0.0.1", 0)
    app = server.application(served, **settings)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, args=([socket],))
    thread.start()
    try:
        yield socket.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def miniature():
    served = load()
    torch.set_num_threads(1)
    return served


@pytest.fixture(scope="module")
def port(miniature):
    with running(miniature, page=server.about(miniature, PROMPTS)) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def texts(miniature):
    """The text that `generate` writes with AR for each prompt."""
    found = []
    for prompt in PROMPTS:
        inputs = miniature.tokenizer(prompt, return_tensors="pt")
        tokens = miniature.model.generate(**inputs, decoding="ar", max_new_tokens=1024)
        found.append(miniature.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def ask(client, prompt: str, **settings):
    """An answer of the chat endpoint; arguments that OpenAI does not have are added to the body."""
    extra = {name: settings.pop(name) for name in ("generation_config",) if name in settings}
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model="miniature", messages=messages, extra_body=extra, **settings)


def text_of(answer) -> str:
    return answer.choices[0].message.content


def streamed(stream) -> tuple[str, list[int], object]:
    """The text of a stream, the number of tokens of each forward, and the last chunk."""
    text, forwards, chunk = "", [], None
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        forwards += [tokens for tokens, _ in (getattr(chunk, "decoding", None) or {}).get("forwards", [])]
    return text, forwards, chunk


def test_a_whole_answer_is_the_text_of_generate(client, miniature, texts):
    answer = ask(client, PROMPTS[0])
    assert text_of(answer) == texts[0]
    assert answer.choices[0].finish_reason == "stop"
    count = len(miniature.tokenizer(texts[0])["input_ids"]) + 1  # plus the end-of-sequence token
    assert answer.usage.completion_tokens == count
    assert answer.usage.prompt_tokens == len(miniature.tokenizer(PROMPTS[0])["input_ids"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + count


def test_a_streamed_answer_comes_forward_by_forward(client, miniature, texts):
    text, forwards, last = streamed(ask(client, PROMPTS[1], stream=True))
    assert text == texts[1]
    assert sum(forwards) == last.usage.completion_tokens
    inputs = miniature.tokenizer(PROMPTS[1], return_tensors="pt")
    stats = miniature.model.generate(**inputs, max_new_tokens=1024, return_dict_in_generate=True).jacobi_stats
    assert forwards == stats.accepted_per_forward and stats.tokens_per_forward > 4
    assert last.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("form", [dict, json.dumps], ids=["object", "text"])
def test_a_request_chooses_how_it_is_decoded(client, texts, form):
    text, forwards, _ = streamed(ask(client, PROMPTS[0], stream=True, generation_config=form(AR)))
    assert text == texts[0] and set(forwards) == {1}
    narrow = {"decoding": "jacobi", "jacobi": {"block_size": 4, "pool_size": 0}}
    text, forwards, _ = streamed(ask(client, PROMPTS[0], stream=True, generation_config=form(narrow)))
    assert text == texts[0] and max(forwards) == 4


def test_a_checkpoint_that_says_nothing_decodes_one_token_at_a_time(miniature):
    tokenizer = tiny_tokenizer()
    model = trained_model()
    assert server.Served("m", model, model, tokenizer).decoding == "ar"
    assert server.Served("m", model, model, tokenizer, "jacobi").decoding == "jacobi"
    assert miniature.decoding == "jacobi"


@pytest.mark.parametrize("config", [{}, AR], ids=["jacobi", "ar"])
def test_stop_strings(client, texts, config):
    stop = texts[0].split()[12] + " "
    whole = ask(client, PROMPTS[0], stop=[stop, "never there"], generation_config=config)
    text, forwards, last = streamed(ask(client, PROMPTS[0], stop=stop, stream=True, generation_config=config))
    assert text_of(whole) == text and texts[0].startswith(text)
    assert stop in text and len(text) < len(texts[0]) / 2
    assert whole.usage.completion_tokens == last.usage.completion_tokens == sum(forwards)
    assert whole.choices[0].finish_reason == last.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_longest_answer(client, texts, name):
    answer = ask(client, PROMPTS[0], **{name: 20})
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 20
    assert texts[0].startswith(text_of(answer))
    text, forwards, last = streamed(ask(client, PROMPTS[0], stream=True, **{name: 20}))
    assert text == text_of(answer) and sum(forwards) == last.usage.completion_tokens == 20 and len(forwards) < 10
    inside = ask(client, PROMPTS[0], generation_config={"max_new_tokens": 7})
    assert inside.usage.completion_tokens == 7


@pytest.mark.parametrize("config", [{}, AR], ids=["jacobi", "ar"])
def test_a_seed_fixes_the_text_whatever_else_runs(client, config):
    settings = {"temperature": 3, "max_tokens": 40, "generation_config": config}
    first = text_of(ask(client, PROMPTS[0], seed=1, **settings))
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(ask, client, PROMPTS[2], **settings) for _ in range(2)]
        again, other = (pool.submit(ask, client, PROMPTS[0], seed=seed, **settings) for seed in (1, 2))
        assert text_of(again.result()) == first != text_of(other.result())
        assert others[0].result() and others[1].result()
    greedy = [text_of(ask(client, PROMPTS[0], seed=seed, max_tokens=40, temperature=0)) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def live(miniature) -> set:
    return miniature.runner.live


def wait_until_idle(miniature) -> float:
    start = time.perf_counter()
    while live(miniature) and time.perf_counter() < start + 20:
        time.sleep(0.01)
    assert not live(miniature)
    return time.perf_counter() - start


def test_a_cancelled_stream_frees_the_model(client, miniature, texts):
    stream = ask(client, ENDLESS, stream=True, max_tokens=1900, generation_config=AR)
    for _, _chunk in zip(range(5), stream):
        pass
    assert live(miniature)
    stream.close()
    assert wait_until_idle(miniature) < 5, "1,900 tokens take longer"
    assert text_of(ask(client, PROMPTS[0])) == texts[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_answer_frees_the_model(port, miniature, client, texts, stream):
    """By then, no part of an unstreamed answer was sent, and a queued one has not even started."""
    body = {"messages": [{"role": "user", "content": ENDLESS}], "max_tokens": 1900, "generation_config": AR}
    connections = []
    for _ in range(2):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": stream}), JSON)
        connections.append(connection)
    while not live(miniature):
        time.sleep(0.01)
    for connection in reversed(connections):
        connection.close()
    assert wait_until_idle(miniature) < 5, "1,900 tokens take longer"
    start = time.perf_counter()
    assert text_of(ask(client, PROMPTS[0])) == texts[0]
    assert time.perf_counter() - start < 5, "the second one did not begin"


JSON = {"Content-Type": "application/json"}


def test_ten_requests_at_once(client, texts):
    def one(number: int) -> bool:
        place, config = number % len(PROMPTS), AR if number % 5 == 0 else {}
        if number % 2:
            return streamed(ask(client, PROMPTS[place], stream=True, generation_config=config))[0] == texts[place]
        return text_of(ask(client, PROMPTS[place], generation_config=config)) == texts[place]

    with ThreadPoolExecutor(10) as pool:
        assert all(pool.map(one, range(10)))


def test_the_other_endpoints_of_text(client, texts):
    answer = client.completions.create(model="miniature", prompt=PROMPTS[0])
    assert answer.choices[0].text == texts[0]
    pieces = list(client.completions.create(model="miniature", prompt=PROMPTS[0], stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == texts[0]
    assert pieces[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert len(pieces) < answer.usage.completion_tokens / 2, "one piece per forward"
    response = client.responses.create(model="miniature", input=PROMPTS[0], stream=False)
    assert response.output_text == texts[0]
    events = list(client.responses.create(model="miniature", input=PROMPTS[0], stream=True))
    assert events[-1].response.output_text == texts[0]


def post(port: int, body, path: str = "/v1/chat/completions") -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    text = body if isinstance(body, (str, bytes)) else json.dumps(body)
    connection.request("POST", path, text, JSON)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


HELLO = [{"role": "user", "content": "hello"}]
MALFORMED = [
    ("{", "JSON"),
    ("[]", "JSON object"),
    ("", "JSON object"),
    ({}, "`messages` is missing"),
    ({"messages": []}, "at least one message"),
    ({"messages": "hello"}, "at least one message"),
    ({"messages": [1]}, "a `role`"),
    ({"messages": [{"content": "hello"}]}, "a `role`"),
    ({"messages": [{"role": "user"}]}, "no `content`"),
    ({"messages": [{"role": "user", "content": ""}]}, "the prompt is empty"),
    ({"messages": [{"role": "user", "content": 7}]}, "must be text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "must be text"),
    ({"messages": [{"role": "user", "content": "a " * 3000}]}, "2048 positions"),
    ({"max_tokens": 0}, "`max_tokens`"),
    ({"max_tokens": -1}, "`max_tokens`"),
    ({"max_tokens": "many"}, "`max_tokens`"),
    ({"max_tokens": 10**30}, "`max_tokens`"),
    ({"max_completion_tokens": True}, "`max_completion_tokens`"),
    ({"seed": 2**65}, "`seed`"),
    ({"seed": "x"}, "`seed`"),
    ({"temperature": -1}, "`temperature`"),
    ({"temperature": "hot"}, "`temperature`"),
    ({"top_p": 0}, "`top_p`"),
    ({"top_p": 1.5}, "`top_p`"),
    ({"frequency_penalty": -1}, "`frequency_penalty`"),
    ({"stop": ""}, "`stop`"),
    ({"stop": [1]}, "`stop`"),
    ({"stream": "yes"}, "`stream`"),
    ({"logit_bias": {"x": 1}}, "invalid literal"),
    ({"logit_bias": {"100000": 1}}, "100000"),
    ({"generation_config": "{"}, "not JSON"),
    ({"generation_config": [1]}, "an object"),
    ({"generation_config": {"decoding": "fast"}}, "`decoding` must be one of"),
    ({"generation_config": {"decodin": "jacobi"}}, "decodin"),
    ({"generation_config": {"jacobi": {"block_sise": 4}}}, "block_sise"),
    ({"generation_config": {"jacobi": {"block_size": 0}}}, "block_size"),
    ({"generation_config": {"decoding": "ar", "jacobi": {"block_size": 4}}}, "Jacobi decoding"),
    ({"generation_config": {"num_beams": 4}}, "num_beams"),
    ({"generation_config": {"max_new_tokens": 0}}, "`max_new_tokens`"),
    ({"generation_config": {"use_cache": False}}, "use_cache"),
    ({"generation_config": {"output_hidden_states": True, "return_dict_in_generate": True}}, "hidden states"),
    ({"model": "another"}, "pinned"),
    ({"model": 3}, "pinned"),
    ({"chat_template_kwargs": 3}, "`chat_template_kwargs`"),
    ({"no_such_field": 1}, "no_such_field"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "said"), MALFORMED, ids=[f"{body!s:.60}" for body, _ in MALFORMED])
def test_a_malformed_body_is_refused_in_a_sentence(port, body, said, stream):
    if isinstance(body, dict) and body and "messages" not in body:
        body = {"messages": HELLO} | body
    if isinstance(body, dict):
        body = {"stream": stream} | body
    status, answer = post(port, body)
    assert status in (400, 422), answer
    assert said in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_malformed_bodies_of_the_other_endpoints(port):
    for body in ({}, {"prompt": 3}, {"prompt": ["a", "b"]}, {"prompt": ""}):
        assert "`prompt`" in post(port, body, "/v1/completions")[1]["error"]["message"]
    for body in ({}, {"input": 3, "stream": False}, {"input": [3], "stream": False}):
        assert post(port, body, "/v1/responses")[0] in (400, 422)
    for path in ("/v1/audio/transcriptions", "/v1/systemone"):
        assert post(port, {}, path)[0] in (400, 404)


def test_the_client_raises_what_was_wrong(client):
    with pytest.raises(openai.BadRequestError, match="`decoding` must be one of"):
        ask(client, "hello", generation_config={"decoding": "fast"})


def test_an_error_in_the_middle_of_a_stream_is_told_as_json(miniature, port, monkeypatch):
    def generate(inputs, config, streamer):
        for token in ([1, 2], [5], [6]):
            streamer.put(torch.tensor(token))
        raise RuntimeError('it said "no"\nand ended')

    monkeypatch.setattr(miniature, "generate", generate)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({"messages": HELLO, "stream": True, "generation_config": AR}), JSON
    )
    events = connection.getresponse().read().decode().strip().split("\n\n")
    assert json.loads(events[-1][6:])["error"] == 'RuntimeError: it said "no"\nand ended'
    status, answer = post(port, {"messages": HELLO})
    assert status == 500 and "it said" in answer["error"]["message"]


def test_one_model_is_served_and_stays(client, port, texts):
    assert [model.id for model in client.models.list()] == ["miniature"]
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/load_model", json.dumps({"model": "another"}), JSON)
    assert b"only serves miniature" in connection.getresponse().read()
    post(port, {}, "/reset")
    assert text_of(ask(client, PROMPTS[0])) == texts[0]


def recorded(miniature, monkeypatch) -> list[str]:
    """Records how each request from now on is decoded."""
    ways, generate = [], miniature.generate

    def recording(inputs, config, streamer=None):
        ways.append(config.decoding)
        return generate(inputs, config, streamer)

    monkeypatch.setattr(miniature, "generate", recording)
    return ways


QUESTION = "Question: Grace has 12 plums. Grace finds 7 plums. How many are there? Solution:"


def test_transformers_chat(port, miniature, monkeypatch):
    """With the client itself."""
    inputs = miniature.tokenizer(QUESTION, return_tensors="pt")
    tokens = miniature.model.generate(**inputs, decoding="ar", max_new_tokens=900)
    expected = miniature.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ways = recorded(miniature, monkeypatch)
    address = f"http://127.0.0.1:{port}"
    program = "from transformers.cli.transformers import main; main()"
    typed = ["chat", "miniature", address, "decoding=jacobi", "do_sample=False", "max_new_tokens=900"]
    done = subprocess.run(
        [sys.executable, "-c", program, *typed],
        input=f"{QUESTION}\n!exit\n",
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200", "TERM": "dumb", "HF_HUB_OFFLINE": "0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert " ".join(expected.split())[:60] in " ".join(done.stdout.split())
    assert ways == ["jacobi"]


def test_transformers_chat_by_a_generation_config(port, miniature, monkeypatch, tmp_path):
    """The client drops `decoding=`, which `GenerationConfig` lacks; from a file it reaches the server."""
    chat = pytest.importorskip("transformers.cli.chat")
    ways, rest = recorded(miniature, monkeypatch), iter([QUESTION, "!exit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(rest))
    (tmp_path / "config.json").write_text(json.dumps({"decoding": "ar"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{port}"
    flags = {"generate_flags": ["do_sample=False", "max_new_tokens=900"], "user": "me"}
    chat.Chat("miniature", address, generation_config=str(tmp_path / "config.json"), **flags)
    assert ways == ["ar"]


# Adapters


@pytest.mark.parametrize("name", ["draft", "full"])
def test_the_folder_of_an_adapter_is_served_on_its_base(adapters, name):
    """With a draft-only adapter the text is the base model's, and AR runs the base model alone."""
    served = load(str(adapters / name))
    assert served.decoding == "jacobi" and served.jacobi.block_size == 6
    assert not any(hasattr(module, "get_base_layer") for module in served.writer.modules())
    with running(served) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        settings = {"model": served.name, "messages": [{"role": "user", "content": "t5 t6 t7"}], "max_tokens": 32}
        texts, counts = [], []
        for config in ({}, AR):
            stream = client.chat.completions.create(stream=True, extra_body={"generation_config": config}, **settings)
            text, forwards, _ = streamed(stream)
            texts.append(text)
            counts.append(len(forwards))
    assert texts[0] == texts[1] and texts[0]
    assert 1 < counts[0] < counts[1], "drafts were accepted"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A base model, and adapters for it: one that only drafts, one for all tokens."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    trained_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name, scope in (("draft", {"alora_invocation_tokens": [-1]}), ("full", {})):
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **scope)
        model = peft.get_peft_model(trained_model(), config)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / name)
        settings = {"decoding": "jacobi", "jacobi": {"block_size": 6, "pool_size": 0}}
        (folder / name / "generation_config.json").write_text(json.dumps(settings))
    return folder


# The command


@pytest.mark.parametrize(
    ("option", "reason"), [("--continuous-batching", "goes around"), ("--compile", "another length")]
)
def test_what_goes_around_jacobi_decoding_is_refused_with_the_reason(option, reason, capsys):
    assert cli.main(["serve", option]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("name", ["serve", "chat"])
def test_mistakes_are_told_before_a_model_is_loaded(name, capsys, monkeypatch):
    monkeypatch.setattr(command, "find", None)
    taken = listening.listen("localhost", 0)
    port = str(taken.getsockname()[1])
    assert cli.main([name, "--port", port]) == 2
    assert f"cannot listen on localhost:{port}" in capsys.readouterr().err
    assert cli.main([name, "--host", "no such host", "--port", "0"]) == 2
    assert "cannot listen on" in capsys.readouterr().err
    for odd in ("-1", "70000", "x"):
        with pytest.raises(SystemExit, match="2"):
            cli.main([name, "--port", odd])
        assert "0 to 65535" in capsys.readouterr().err
    monkeypatch.setattr(listening.importlib.util, "find_spec", lambda name: None)
    assert cli.main([name]) == 2
    assert "pip install '.[serve]'" in capsys.readouterr().err


def test_ctrl_c_ends_the_server_in_the_middle_of_an_answer():
    command = [sys.executable, "-m", "hf_jacobi", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = next(line for line in iter(process.stdout.readline, "") if "http" in line)
        assert "Serving miniature" in said and "Jacobi decoding" in said
        connection = http.client.HTTPConnection("localhost", int(re.search(r":(\d+)/v1", said)[1]))
        body = {"messages": [{"role": "user", "content": ENDLESS}], "max_tokens": 1900, "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body | {"generation_config": AR}), JSON)
        connection.getresponse().read(300)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors, errors


def test_a_model_that_cannot_be_decoded_so_is_refused_before_it_is_served():
    model = trained_model()
    model.generation_config.token_healing = True
    with pytest.raises(UsageError, match="token healing"):
        server.Served("m", model, model, tiny_tokenizer(), "jacobi").warm_up()


def test_the_page_and_what_it_asks_for(port):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    kinds = {"/": "text/html", "/page/chat.js": "javascript", "/page/chat.css": "text/css", "/page/about": "json"}
    for path, kind in kinds.items():
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200 and kind in response.headers["content-type"]
        content = response.read()
    assert json.loads(content)["examples"] == PROMPTS


def test_a_taken_port_is_told_before_torch_is_imported():
    taken = listening.listen("localhost", 0)
    port = taken.getsockname()[1]
    run = f"print(cli.main(['serve', '--port', '{port}']), 'torch' in sys.modules)"
    code = f"import sys; from hf_jacobi import cli; {run}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.split() == ["2", "False"], ended.stderr
    assert "cannot listen on" in ended.stderr
