"""
Trains the models that the tests use, and keeps their weights in `tests/weights/`.

    python tests/train_tiny_models.py                       # all, a quarter of an hour
    python tests/train_tiny_models.py llama opt word_chain  # some

Each architecture learns its own language (`TinyLanguage`). In its texts, a block of guesses converges in one forward
up to the next leader, whose successor n-grams predict and the model's own guesses do not. All that drafts can do
happens within fifty tokens, and the model is sure of each of them.
"""

from __future__ import annotations

import sys
import zlib

import fixtures
import torch
from decoding.test_loop import check_architecture
from fixtures import keep_weights
from models import ARCHITECTURES, VOCABULARY, padded_prompts, tiny_config, trained_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM


LAG = 5  # less than the windows of the models that have one
FIRST = 3  # ids 0 to 2 are padding, beginning and end
ROWS, LENGTH = 24, 80  # of a batch; no test needs longer texts
STEPS = (300, 1200)  # 1,200 if 300 are not enough
ACCURACY = 0.98
SEEDS = 8


class TinyLanguage:
    """
    Every token follows from the one `LAG` places before it, but the successor of a "leader" follows from the leader.

    The map from token to token has cycles of three, so that a text repeats itself after 3 * `LAG` tokens unless a
    leader changes it; a fifth of all tokens are leaders.
    """

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(VOCABULARY - FIRST, generator=generator) + FIRST
        self.lagged, self.led = torch.arange(VOCABULARY), torch.arange(VOCABULARY)
        self.lagged[shuffled] = shuffled.view(-1, 3).roll(1, dims=1).flatten()
        self.led[FIRST:] = torch.randperm(VOCABULARY - FIRST, generator=generator) + FIRST
        self.leads = torch.zeros(VOCABULARY, dtype=torch.bool)
        self.leads[torch.randperm(VOCABULARY, generator=generator)[: VOCABULARY // 5]] = True

    def texts(self, generator: torch.Generator) -> torch.Tensor:
        """`[ROWS, LENGTH]`: `LAG` random tokens and what follows from them."""
        texts = torch.randint(FIRST, VOCABULARY, (ROWS, LENGTH), generator=generator)
        for place in range(LAG, LENGTH):
            before, lagged = texts[:, place - 1], texts[:, place - LAG]
            texts[:, place] = torch.where(self.leads[before], self.led[before], self.lagged[lagged])
        return texts


def train(name: str, seed: int, steps: int):
    """A model of the named architecture that writes `TinyLanguage(seed)`, and the share of tokens it gets right."""
    language = TinyLanguage(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    right = []
    for _ in range(steps):
        texts = language.texts(generator)
        logits, targets = model(texts, use_cache=False).logits[:, LAG - 1 : -1], texts[:, LAG:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right.append(float((logits.argmax(-1) == targets).float().mean()))
    return model.eval(), sum(right[-20:]) / 20


def fit(name: str) -> None:
    """Trains until the model meets the tests' conditions, and keeps it."""
    for attempt in range(SEEDS):
        seed = zlib.crc32(f"{name}/{attempt}".encode()) % 2**31
        for steps in STEPS:
            model, accuracy = train(name, seed, steps)
            print(f"{name}, attempt {attempt}: {accuracy:.1%} correct after {steps} steps", flush=True)
            if accuracy > ACCURACY:
                break
        keep_weights(model, name)
        try:
            for rows in (1, 3):
                smallest_gap(name, rows)
            check_architecture(name)
            return
        except AssertionError as error:
            print(f"{name}, attempt {attempt}: {str(error).splitlines()[0]}", flush=True)
    raise SystemExit(f"{name}: none of {SEEDS} languages meets all conditions")


def run_through(model, batches, rate: float) -> None:
    """Trains a model on batches of token ids and labels."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=len(batches))
    for ids, labels in batches:
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"loss {loss.item():.4f} after {len(batches)} steps", flush=True)


def fit_permuted_copy(steps: int = 400) -> None:
    """The model of `fixtures.permuted_copy_model`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(fixtures.PERMUTED_COPY)
    generator = torch.Generator().manual_seed(1)
    texts = [fixtures.permuted_copy_batch(16, 96, generator) for _ in range(steps)]
    random_part = torch.arange(96) < fixtures.PERIOD
    run_through(model, [(batch, batch.masked_fill(random_part, -100)) for batch in texts], rate=5e-3)
    keep_weights(model, "permuted_copy")


def fit_word_chain(steps: int = 700) -> None:
    """The model of `fixtures.word_chain_model`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(fixtures.WORD_CHAIN)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(steps):
        rows = [fixtures.word_chain(generator) for _ in range(16)]
        width = max(len(prompt) + len(text) for prompt, text in rows)
        filled = [(prompt, text, width - len(prompt) - len(text)) for prompt, text in rows]
        ids = [prompt + text + [0] * padding for prompt, text, padding in filled]
        labels = [[-100] * len(prompt) + text + [-100] * padding for prompt, text, padding in filled]
        batches.append((torch.tensor(ids), torch.tensor(labels)))
    run_through(model, batches, rate=3e-3)
    keep_weights(model, "word_chain")


def smallest_gap(name: str, rows: int) -> None:
    """Fails if two tokens score so nearly the same that rounding could decide between them."""
    settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "output_logits": True}
    out = trained_model(name).generate(**padded_prompts(rows), **settings, return_dict_in_generate=True)
    best = torch.stack(out.logits).topk(2).values
    gap = float((best[..., 0] - best[..., 1]).min())
    assert gap > 2e-3, f"the first and the second choice lie {gap:.3f} apart"


if __name__ == "__main__":
    torch.set_num_threads(1)
    others = {"permuted_copy": fit_permuted_copy, "word_chain": fit_word_chain}
    for name in sys.argv[1:] or [*ARCHITECTURES, *others]:
        others[name]() if name in others else fit(name)
