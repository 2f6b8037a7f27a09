"""
`vllm serve` with Jacobi drafts under load: is any request lost, wrong or hanging, and does its memory stay flat?

    scripts/test-with-vllm --run python -m benchmarks.vllm_load            # the miniature, 32 clients, seven minutes

Each client sends one request after the other to a server on this machine: one of many prompts, greedy, streamed or
whole. A third is cancelled midway; some have nonsensical parameters, which the server must refuse with status 4xx or
serve. Every finished text is compared with the one that vLLM writes without drafts. The exit status is 1 if one
differs, a request fails or takes too long, or memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import psutil

from hf_jacobi.cli.models import MINIATURE

from .miniature.tasks import held_out_problems
from .vllm import DRAFTED, JACOBI


LONGEST = 512
NEW_TOKENS = 240
CACHE_BLOCKS = 128
PATIENCE = 120.0  # seconds for one request
CANCELLED = 1 / 3
ABSURD = 0.1
# Of memory in the last quarter. For some minutes vLLM's worker takes more as its forwards see new numbers of tokens,
# of which there are more with drafts; --without-drafts shows what it takes then.
GROWTH = 1.03
SPECULATIVE = {"method": "custom_class", "model": JACOBI, "num_speculative_tokens": DRAFTED}

NONSENSE: list[dict] = [
    {"temperature": 1, "top_k": 3},  # valid, but not compared
    {"temperature": 0.5, "top_p": 0.9, "seed": 7, "logprobs": 2},
    {"max_tokens": -1},
    {"max_tokens": 0},
    {"max_tokens": 10**12},
    {"max_tokens": "many"},
    {"temperature": -1},
    {"temperature": 1e9},
    {"temperature": "hot"},
    {"top_p": 7},
    {"top_p": 0},
    {"top_k": -5},
    {"min_p": 3},
    {"n": 0},
    {"n": 10**6},
    {"best_of": -1},
    {"logprobs": 10**6},
    {"logprobs": -7},
    {"prompt_logprobs": 10**6},
    {"stop": [""] * 5},
    {"stop": 12},
    {"stop_token_ids": [-1, 10**9]},
    {"seed": -(10**30)},
    {"seed": 1.5},
    {"logit_bias": {"5": 1e9}},
    {"logit_bias": {"no token": 1}},
    {"repetition_penalty": -2},
    {"presence_penalty": 1e9},
    {"min_tokens": 10**6},
    {"bad_words": [""]},
    {"allowed_token_ids": []},
    {"allowed_token_ids": [10**9]},
    {"prompt": []},
    {"prompt": ""},
    {"prompt": [-1, 5]},
    {"prompt": [10**9]},
    {"prompt": "word " * 20000},
    {"prompt": {"a": 1}},
    {"prompt": None},
    {"model": "another"},
    {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"json": "no schema"}},
    {"truncate_prompt_tokens": -9},
    {"stream": "perhaps"},
]


def prompts_of(count: int) -> list[str]:
    """Problems, and random excerpts from them."""
    draw = random.Random(5)
    whole = [problem.prompt for problem in held_out_problems(-(-count // 4))][: count // 2]
    texts = "".join(whole)
    cuts = [draw.randrange(len(texts) - 400) for _ in range(count - len(whole))]
    return whole + [texts[start : start + draw.randint(1, 400)] for start in cuts]


@contextmanager
def server(model: str, *options: str):
    """`vllm serve` on a free port of this machine; yields its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", str(LONGEST), "--max-num-seqs", "16"]
    # A cache that is soon full: its pages count as memory once they are used.
    command += ["--num-gpu-blocks-override", str(CACHE_BLOCKS)]
    command += ["--served-model-name", "model", "--disable-uvicorn-access-log", *options]
    process = subprocess.Popen(command)
    try:
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


async def ready(session, address: str, process) -> None:
    """Waits until the server answers."""
    import aiohttp

    for _ in range(600):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise SystemExit("the server ended while it started")
        try:
            async with session.get(f"{address}/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.5)
    raise SystemExit("the server did not start within five minutes")


def body_of(prompt: str, new_tokens: int, **more) -> dict:
    body = {"model": "model", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "return_token_ids": True}
    return body | more


async def whole(session, address: str, body: dict) -> tuple[int, dict]:
    """The status and the answer."""
    async with session.post(f"{address}/v1/completions", json=body) as response:
        return response.status, await response.json(content_type=None)


async def streamed(session, address: str, body: dict, until: int | None = None) -> list[int] | None:
    """The tokens of a streamed answer; None where the connection was closed after `until` pieces."""
    tokens, ended = [], False
    async with session.post(f"{address}/v1/completions", json=body | {"stream": True}) as response:
        assert response.status == 200, (response.status, await response.text())
        pieces = 0
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                ended = True
                break
            choice = json.loads(line[6:])["choices"][0]
            tokens += choice.get("token_ids") or []
            pieces += 1
            if until is not None and pieces >= until:
                return None
    assert ended, "the stream ended early"
    return tokens


class Load:
    """
    What the clients do, and the results.

    Args:
        expected: prompt -> the tokens that vLLM writes without drafts.
    """

    def __init__(self, address: str, expected: dict[str, list[int]], seconds: float):
        self.address, self.expected = address, expected
        self.end = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.tokens = 0

    async def client(self, session, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.end:
            try:
                await asyncio.wait_for(self.request(session, draw), PATIENCE)
            except TimeoutError:
                self.faults.append("a request took too long")
            except Exception as error:  # whatever the cause, the request was lost
                self.faults.append(f"{type(error).__name__}: {error}"[:300])

    async def request(self, session, draw: random.Random) -> None:
        prompt, length = draw.choice(list(self.expected)), draw.randint(1, NEW_TOKENS)
        body, kind = body_of(prompt, length), draw.random()
        if kind < ABSURD:
            nonsense = draw.choice(NONSENSE)
            status, answer = await whole(session, self.address, body | nonsense)
            self.counts[f"absurd, {status}"] += 1
            if not (status == 200 or 400 <= status < 500):
                self.faults.append(f"{str(nonsense)[:80]}: status {status}, {str(answer)[:200]}")
            return
        if kind < ABSURD + CANCELLED:
            done = await streamed(session, self.address, body, until=draw.randint(1, 12)) is not None
            self.counts["over before it was cancelled" if done else "cancelled"] += 1
            return
        if draw.random() < 0.5:
            tokens = await streamed(session, self.address, body)
        else:
            status, answer = await whole(session, self.address, body)
            assert status == 200, (status, answer)
            tokens = answer["choices"][0]["token_ids"]
        self.counts["finished"] += 1
        self.tokens += len(tokens)
        if tokens != self.expected[prompt][:length]:
            self.faults.append(f"another text than AR's: {prompt[:60]!r}, {length} tokens")


def memory(process) -> dict[str, int]:
    """MiB of the server and of every process it started, with shared memory counted once."""
    used: Counter[str] = Counter()
    for each in [process, *process.children(recursive=True)]:
        try:
            used[each.name()] += each.memory_full_info().pss >> 20
        except psutil.Error:
            continue
    return dict(used)


async def watch(process, end: float) -> list[dict[str, int]]:
    """Measures memory every five seconds."""
    seen = []
    while time.monotonic() < end:
        seen.append(memory(process))
        await asyncio.sleep(5)
    return seen


async def idle(session, address: str) -> bool:
    """Whether no request runs or waits any more, within ten seconds."""
    for _ in range(20):
        async with session.get(f"{address}/metrics") as response:
            lines = (await response.text()).splitlines()
        named = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
        if all(float(line.split()[-1]) == 0 for line in lines if line.startswith(named)):
            return True
        await asyncio.sleep(0.5)
    return False


async def measure(arguments) -> int:
    """Runs both servers, one after the other; returns the exit status."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None)
    connector = lambda: aiohttp.TCPConnector(limit=0)  # noqa: E731
    prompts = prompts_of(arguments.prompts)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector()) as session:
        with server(arguments.model) as (address, process):
            await ready(session, address, process)
            answers = await asyncio.gather(
                *(whole(session, address, body_of(prompt, NEW_TOKENS)) for prompt in prompts)
            )
    expected = {prompt: answer["choices"][0]["token_ids"] for prompt, (_, answer) in zip(prompts, answers)}
    print(f"AR: {sum(map(len, expected.values()))} tokens for {len(prompts)} prompts", flush=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector()) as session:
        drafts = [] if arguments.without_drafts else ["--speculative-config", json.dumps(SPECULATIVE)]
        with server(arguments.model, *drafts) as (address, process):
            await ready(session, address, process)
            load = Load(address, expected, arguments.seconds)
            watching = asyncio.create_task(watch(process, load.end))
            await asyncio.gather(*(load.client(session, seed) for seed in range(arguments.clients)))
            seen = await watching
            if not await idle(session, address):
                load.faults.append("requests run or wait although all clients are gone")
            last = body_of(prompts[0], NEW_TOKENS)
            if (await whole(session, address, last))[1]["choices"][0]["token_ids"] != expected[prompts[0]]:
                load.faults.append("after the load, another text than AR's")
            seen.append(memory(process))
    start, end = sum(seen[3 * len(seen) // 4].values()), sum(seen[-1].values())
    if end > GROWTH * start:
        load.faults.append(f"memory grew from {start} to {end} MiB in the last quarter")
    report = {"counts": dict(load.counts), "tokens": load.tokens, "faults": load.faults}
    report["memory_mib"] = {name: [at.get(name, 0) for at in seen] for name in seen[-1]}
    print(json.dumps(report))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if load.faults else 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.vllm_load", description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", default=str(MINIATURE), help="folder of a checkpoint (default: the miniature)")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--without-drafts", action="store_true", help="to compare its memory")
    parser.add_argument("--output", type=Path)
    return asyncio.run(measure(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
