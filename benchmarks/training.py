"""
What Jacobi Forcing costs compared with plain fine-tuning: time and memory of a step, and the memory of its losses.

    python -m benchmarks.training speed       # completions per second against transformers.Trainer on the same texts
    python -m benchmarks.training memory      # peak memory of the losses at a vocabulary of 150,000 and 4,096 tokens
    python -m benchmarks.training attention   # the dense mask, compared with one call for the text and one per window
    python -m benchmarks.training drafts      # a draft-only adapter of SmolLM2: text and noise in one forward, in two

Each measurement runs in a separate process, because peak memory can only grow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext

import torch


USE_CPU = not torch.cuda.is_available()


def in_own_process(measurement: str, *arguments) -> dict:
    """Runs `_measurement(*arguments)` of this module in another process."""
    command = [sys.executable, "-m", "benchmarks.training", "one", measurement, json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def peak_megabytes() -> float:
    """The peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# Memory of the losses


def one_memory(way: str, vocabulary: int, tokens: int, chunk_size: int) -> dict:
    """Forward and backward of both losses over `tokens` text and as many noisy tokens; hidden size 256."""
    from hf_jacobi.training.losses import Targets, consistency_loss, sum_losses

    torch.manual_seed(0)
    head = torch.nn.Linear(256, vocabulary, bias=False)
    hidden = torch.randn(1, 2 * tokens, 256, requires_grad=True)
    places = torch.arange(tokens)
    targets = Targets(places, torch.randint(vocabulary, (tokens,)), places + tokens, places)
    before, start = peak_megabytes(), time.perf_counter()
    if way == "chunked":
        terms = sum_losses(head, hidden, targets, chunk_size=chunk_size)
        loss = terms.consistency + terms.ar
    else:
        logits = head(hidden.flatten(0, 1))
        ar = torch.nn.functional.cross_entropy(logits[targets.clean], targets.labels, reduction="sum")
        loss = consistency_loss(logits[targets.noisy], logits[targets.clean], "soft", 1.0).sum() + ar
    loss.backward()
    return {
        "megabytes": peak_megabytes() - before,
        "seconds": time.perf_counter() - start,
        "loss": loss.item(),
        "gradient": hidden.grad.norm().item(),
    }


def memory(arguments) -> dict:
    rows = {}
    for way, chunk in (("straightforward", 0), ("chunked", 512), ("chunked", 128)):
        name = way if not chunk else f"{way}, {chunk} tokens"
        rows[name] = in_own_process("memory", way, arguments.vocabulary, arguments.tokens, chunk)
        print(f"{name:24}{rows[name]['megabytes']:>10.0f} MB{rows[name]['seconds']:>8.1f} s", flush=True)
    return rows


# Speed against plain fine-tuning


def small_model(layers: int = 6, hidden: int = 256, vocabulary: int = 4096, attention: str = "sdpa"):
    """A random Llama of about 7 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=16384,
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config)


def made_up_trajectories(
    count: int, length: int, size: int = 16, prompt: int = 64, vocabulary: int = 4096
) -> list[dict]:
    """Random texts whose states converge one token at a time."""
    generator = random.Random(0)
    rows = []
    for _ in range(count):
        text = generator.choices(range(3, vocabulary), k=length)
        blocks = []
        for start in range(0, length, size):
            final = text[start : start + size]
            blocks.append([final[:right] + [3] * (len(final) - right) for right in range(len(final))] + [final])
        prompt_ids = generator.choices(range(3, vocabulary), k=prompt)
        rows.append({"prompt_ids": prompt_ids, "completion_ids": text, "block_size": size, "trajectories": blocks})
    return rows


def one_speed(way: str, length: int, steps: int, batch: int) -> dict:
    """Trains for some steps on completions of `length` tokens."""
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from hf_jacobi import JacobiForcingConfig, JacobiForcingTrainer
    from hf_jacobi.trajectories.packing import PackSettings, packed_rows

    rows = made_up_trajectories(batch * steps, length)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True,
            "per_device_train_batch_size": batch,
            "max_steps": steps,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        if way == "sft":
            texts = [row["prompt_ids"] + row["completion_ids"] for row in rows]
            labels = [[-100] * len(row["prompt_ids"]) + row["completion_ids"] for row in rows]
            data = Dataset.from_dict({"input_ids": texts, "labels": labels})
            collate = lambda some: {key: torch.tensor([row[key] for row in some]) for key in some[0]}  # noqa: E731
            trainer = Trainer(small_model(), TrainingArguments(**settings), collate, data)
        else:
            packed = list(packed_rows(rows, PackSettings(8, "linear", 0.0, 1.0, None, False, 0)))
            arguments = JacobiForcingConfig(**settings)
            trainer = JacobiForcingTrainer(small_model(), arguments, Dataset.from_list(packed))
        times = []

        class Clock(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                times.append(time.perf_counter())

        trainer.add_callback(Clock())
        before = peak_megabytes()
        trainer.train()
    seconds = sorted(after - start for start, after in itertools.pairwise(times))
    return {"completions_per_second": batch / seconds[len(seconds) // 2], "megabytes": peak_megabytes() - before}


def speed(arguments) -> dict:
    rows = {}
    print(f"{'completion':12}{'sft':>12}{'forcing':>12}{'ratio':>8}{'sft MB':>10}{'forcing MB':>12}{'ratio':>8}")
    for length in (256, 512, 1024):
        for way in ("sft", "forcing"):
            rows[f"{length}/{way}"] = in_own_process("speed", way, length, arguments.steps, 4)
        plain, ours = rows[f"{length}/sft"], rows[f"{length}/forcing"]
        rate, space = (ours[key] / plain[key] for key in ("completions_per_second", "megabytes"))
        print(
            f"{length:<12}{plain['completions_per_second']:>10.2f}/s{ours['completions_per_second']:>10.2f}/s"
            f"{rate:>8.2f}{plain['megabytes']:>10.0f}{ours['megabytes']:>12.0f}{space:>8.2f}",
            flush=True,
        )
    return rows


# Attention: the dense mask, or one call for the text and one per window


def one_attention(way: str, tokens: int, rounds: int) -> dict:
    """Forward and backward of one row of `tokens` tokens, text and noise together; windows of 16 blocks of 16."""
    from hf_jacobi.training.collator import PackedCollator
    from hf_jacobi.training.mask import RowTensors, dense_mask
    from hf_jacobi.training.windows import attending_by_windows, segments
    from hf_jacobi.trajectories.packing import PackSettings, packed_rows

    length = (tokens - 64) // 2 // 16 * 16
    settings = PackSettings(16, "linear", 0.0, 1.0, None, False, 0)
    batch = PackedCollator(0)(list(packed_rows(made_up_trajectories(1, length), settings)))
    rows, model = RowTensors.of(batch), small_model()
    seconds, norms = [], []
    before = peak_megabytes()
    for _ in range(rounds):
        start = time.perf_counter()
        if way == "dense":
            mask, attention = dense_mask(rows, model.config, torch.float32), nullcontext()
        else:
            mask, attention = segments(rows), attending_by_windows(model)
        with attention:
            hidden = model.model(
                batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"], use_cache=False
            ).last_hidden_state
            hidden.square().mean().backward()
        norms.append(model.model.embed_tokens.weight.grad.norm().item())
        model.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "megabytes": peak_megabytes() - before, "gradient": norms[0]}


def attention(arguments) -> dict:
    rows = {}
    print(f"{'tokens':8}{'dense':>10}{'windows':>10}{'ratio':>8}{'dense MB':>12}{'windows MB':>12}")
    for tokens in (1024, 2048, 4096, 8192):
        for way in ("dense", "windows"):
            rows[f"{tokens}/{way}"] = in_own_process("attention", way, tokens, 3)
        dense, ours = rows[f"{tokens}/dense"], rows[f"{tokens}/windows"]
        print(
            f"{tokens:<8}{dense['seconds']:>9.2f}s{ours['seconds']:>9.2f}s{dense['seconds'] / ours['seconds']:>7.2f}x"
            f"{dense['megabytes']:>12.0f}{ours['megabytes']:>12.0f}",
            flush=True,
        )
    return rows


# Draft-only adapters: text and noise in one forward, or the text once for several copies of the noise


def one_drafts(
    model: str, way: str, copies: int, length: int, batch: int, steps: int, dtype: str, attention: str, compiled: bool
) -> dict:
    """Noisy tokens with a target per second of process time, and the memory of a step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback

    from hf_jacobi import JacobiForcingConfig, JacobiForcingTrainer
    from hf_jacobi.training.collator import PLAN
    from hf_jacobi.trajectories.packing import PackSettings, packed_rows

    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=attention)
    rows = made_up_trajectories(batch, length, vocabulary=base.config.vocab_size)
    data = list(packed_rows(rows, PackSettings(1, "random", 0.0, 1.0, None, False, 0, copies)))
    starts, seconds = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            starts.append(time.process_time())

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.process_time() - starts[-1])

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = JacobiForcingTrainer(
            base,
            JacobiForcingConfig(
                folder,
                report_to="none",
                use_cpu=USE_CPU,
                adapter_scope="draft",
                per_device_train_batch_size=batch,
                max_steps=steps,
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                bf16=dtype == "bfloat16",
                compile_layers=compiled,
            ),
            train_dataset=Dataset.from_list(data),
            peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        if way == "one":
            trainer.text_once, trainer.planner.text_once = None, False
        noisy, before = trainer.data_collator(data)[PLAN].targets.counts[1], peak_megabytes()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "noisy_tokens_per_second": noisy / min(seconds),
        "seconds": min(seconds),
        "noisy_tokens": noisy,
        "megabytes": peak_megabytes() - before,
        "loss": losses[-1],
    }


def drafts(arguments) -> dict:
    rows = {}
    print(f"{'forwards':10}{'copies':>8}{'noisy tokens':>14}{'seconds':>9}{'a second':>10}{'ratio':>8}{'MB':>8}")
    for way, copies in (("one", 1), ("two", 1), ("two", 2), ("two", 4)):
        settings = (
            way,
            copies,
            arguments.length,
            arguments.batch,
            arguments.steps,
            arguments.dtype,
            arguments.attention,
            arguments.compile,
        )
        found = rows[f"{way}/{copies}"] = in_own_process("drafts", arguments.model, *settings)
        rate = found["noisy_tokens_per_second"]
        print(
            f"{way:10}{copies:>8}{found['noisy_tokens']:>14}{found['seconds']:>9.2f}{rate:>10.1f}"
            f"{rate / rows['one/1']['noisy_tokens_per_second']:>8.2f}{found['megabytes']:>8.0f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "attention", "drafts", "one"))
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the model of `drafts`")
    parser.add_argument("--length", type=int, default=256, help="tokens of a completion in `drafts`")
    parser.add_argument("--batch", type=int, default=1, help="texts per step in `drafts`")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of `drafts`")
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"), help="of `drafts`")
    parser.add_argument("--compile", action="store_true", help="compile the layers in `drafts`")
    parser.add_argument("--output", help="a JSON file for the results")
    arguments = parser.parse_args()
    if arguments.what == "one":
        measurement, values = arguments.rest
        print(json.dumps(globals()[f"one_{measurement}"](*json.loads(values))))
        return
    result = globals()[arguments.what](arguments)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(
                {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": result}, file, indent=1
            )


if __name__ == "__main__":
    main()
