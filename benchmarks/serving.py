"""
`hf-jacobi serve` compared with `generate` in the same process: time to the first token, and tokens per second.

    python -m benchmarks.serving [MODEL] [--decoding ar] [--max-new-tokens 256] [--repeats 5]

The server runs in a thread; its client is a separate process that does nothing else. Both ways take turns,
prompt by prompt; the ratios are medians over pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from statistics import median

from hf_jacobi.cli.models import MINIATURE, find
from hf_jacobi.evaluation.prompts import CHAT
from hf_jacobi.serving.listening import listen
from hf_jacobi.serving.server import SWITCH, Served, application


# Reads one request per line; answers with seconds to the first text, total seconds, tokens.
CLIENT = """
import http.client, json, sys, time
for line in sys.stdin:
    port, body = json.loads(line)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    first, lines = None, []
    for row in connection.getresponse():
        lines.append(row)
        if first is None and b'"content":"' in row:
            first = time.perf_counter() - start
    seconds = time.perf_counter() - start
    usage = json.loads(lines[-2][6:])["usage"]
    print(json.dumps([first, seconds, usage["completion_tokens"]]), flush=True)
"""


class First:
    """A streamer that notes when the first new token arrives."""

    def __init__(self):
        self.puts, self.seconds, self.start = 0, None, time.perf_counter()

    def put(self, value) -> None:
        self.puts += 1
        if self.puts == 2:  # the first one is the prompt
            self.seconds = time.perf_counter() - self.start

    def end(self) -> None:
        pass


def in_process(served: Served, body: dict) -> tuple[float, float, int]:
    """Seconds to the first token, total seconds, tokens."""
    first = First()
    _, config = served.prepared(body)
    config = served.settled(body, config)
    tokens = served.generate(served.encode(body["messages"]), config, first)
    return first.seconds, time.perf_counter() - first.start, len(tokens)


def main() -> None:
    import torch
    import uvicorn
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(MINIATURE))
    parser.add_argument("--decoding", choices=("ar", "jacobi"), default="jacobi")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH)  # as `serve` does
    logging.set_verbosity_error()
    found = find(arguments.model)
    loaded = found.load()
    served = Served("model", loaded.model, loaded.writer, found.tokenizer(), arguments.decoding, loaded.config)
    served.warm_up()
    own = json.loads((MINIATURE / "prompts.json").read_text(encoding="utf-8"))
    prompts = own if arguments.model == str(MINIATURE) else CHAT[:4]
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(application(served), log_level="error"))
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    rows: dict[str, list] = {"generate": [], "serve": []}
    with subprocess.Popen([sys.executable, "-c", CLIENT], stdin=-1, stdout=-1, text=True, bufsize=1) as client:
        for repeat in range(arguments.repeats + 1):
            for prompt in prompts:
                body = {"messages": [{"role": "user", "content": prompt}], "stream": True}
                body["generation_config"] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
                client.stdin.write(json.dumps([listening.getsockname()[1], body]) + "\n")
                served_row, own_row = json.loads(client.stdout.readline()), in_process(served, body)
                if served_row[2] != own_row[2]:
                    raise SystemExit(f"{served_row[2]} tokens and {own_row[2]}: the texts differ")
                if repeat:  # the first round warms up
                    rows["serve"].append(served_row)
                    rows["generate"].append(own_row)
        client.stdin.close()
    server.should_exit = True
    figures = {
        way: {
            "first_token_ms": round(1000 * median(row[0] for row in found), 2),
            "tokens_per_second": round(median(row[2] / row[1] for row in found), 1),
        }
        for way, found in rows.items()
    }
    pairs = list(zip(rows["serve"], rows["generate"]))  # pairs of consecutive runs
    figures["first_token_more_ms"] = round(1000 * median(over[0] - own[0] for over, own in pairs), 2)
    figures["first_token_ratio"] = round(median(over[0] / own[0] for over, own in pairs), 3)
    figures["tokens_per_second_ratio"] = round(median(own[1] / over[1] for over, own in pairs), 3)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
