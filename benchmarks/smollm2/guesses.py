"""
How many tokens of held-out text a table of n-grams guesses, and how many the n-grams of the text itself do.

    python -m benchmarks.smollm2.texts prompts/held_out.jsonl held_out_texts.jsonl --max-new-tokens 96
    python -m benchmarks.smollm2.guesses held_out_texts.jsonl TABLE [TABLE ...]

prints the share of tokens that equal the first guess, by kind of prompt. No model runs.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from hf_jacobi.decoding.ngram_pool import LONGEST_MATCH, NgramPool
from hf_jacobi.decoding.ngram_table import find_table, load_table


def of_text(rows: list[dict]) -> int:
    """The tokens that the latest of the longest matches in the text before them guesses."""
    correct = 0
    for row in rows:
        pool, text = NgramPool(), list(row["prompt_ids"])
        pool.extend(text)
        for token in row["completion_ids"]:
            found = pool.matches(text[-LONGEST_MATCH:], 1, 1)
            correct += bool(found) and found[0][1] == [token]
            text.append(token)
            pool.extend([token])
    return correct


def of_table(rows: list[dict], table) -> int:
    """The tokens that a table guesses."""
    correct = 0
    for row in rows:
        text = list(row["prompt_ids"])
        for token in row["completion_ids"]:
            found = table.next(text)
            correct += found is not None and found[0] == token
            text.append(token)
    return correct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="what benchmarks.smollm2.texts wrote")
    parser.add_argument("tables", nargs="+", help="tables, by the names that `ngram_table` takes")
    arguments = parser.parse_args()
    kinds: dict[str, list[dict]] = {}
    for line in arguments.texts.read_text().splitlines():
        row = json.loads(line)
        kinds.setdefault(row["kind"], []).append(row)
    total = Counter({kind: sum(len(row["completion_ids"]) for row in rows) for kind, rows in kinds.items()})
    found = {"the text itself": Counter({kind: of_text(rows) for kind, rows in kinds.items()})}
    for name in arguments.tables:
        table = load_table(str(find_table(name, "")), "")
        found[f"{name}, {len(table):,} contexts"] = Counter(
            {kind: of_table(rows, table) for kind, rows in kinds.items()}
        )
    for name, correct in found.items():
        shares = ", ".join(f"{kind} {correct[kind] / total[kind]:.0%}" for kind in kinds)
        print(f"{name}: all {correct.total() / total.total():.1%}; {shares}")


if __name__ == "__main__":
    main()
