"""
Prompts that every machine has: signatures and docstrings of Python's standard library.

    python -m benchmarks.stdlib_prompts prompts.jsonl --count 1000

Which functions there are depends a little on the version of Python; the order is fixed by a seed.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import sys
import warnings


SKIPPED = {"antigravity", "this", "idlelib", "turtledemo", "lib2to3", "turtle"}
LONGEST = 600  # characters of a docstring


def functions():
    """`(name, signature, docstring)` of the public functions and methods of the standard library."""
    seen = set()
    for module in sorted(sys.stdlib_module_names):
        if module.startswith("_") or module in SKIPPED:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = importlib.import_module(module)
        except ImportError:  # not built here, or for another system
            continue
        owners = [(module, found)] + [
            (f"{module}.{name}", member) for name, member in inspect.getmembers(found, inspect.isclass)
        ]
        for path, owner in owners:
            for name, member in inspect.getmembers(owner, inspect.isroutine):
                document = inspect.getdoc(member)
                if name.startswith("_") or not document or len(document) > LONGEST or document in seen:
                    continue
                try:
                    signature = str(inspect.signature(member))
                except (ValueError, TypeError, AttributeError):  # builtins without a readable one
                    continue
                if " at 0x" in signature:
                    continue
                seen.add(document)
                yield f"{path}.{name}", name, signature, document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="a JSONL file of `id` and `messages`")
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    rows = sorted(functions())
    random.Random(0).shuffle(rows)
    with open(arguments.output, "w", encoding="utf-8") as file:
        for path, name, signature, document in rows[: arguments.count]:
            quoted = "\n    ".join(document.splitlines())
            content = f'Write this Python function.\n\ndef {name}{signature}:\n    """{quoted}"""'
            file.write(json.dumps({"id": path, "messages": [{"role": "user", "content": content}]}) + "\n")
    print(f"{min(len(rows), arguments.count)} prompts of {len(rows)} written to {arguments.output}")


if __name__ == "__main__":
    main()
