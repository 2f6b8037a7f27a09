"""Jacobi drafts in vLLM itself (`scripts/test-with-vllm`): the same text in fewer forwards."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from fixtures import permuted_copy_batch, permuted_copy_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_jacobi
from hf_jacobi.cli.models import MINIATURE
from hf_jacobi.serving.vllm import tokens_per_forward


pytestmark = pytest.mark.vllm

SMOLLM2 = Path(os.environ.get("HF_JACOBI_CACHE", "~/.cache/hf_jacobi")).expanduser() / "smollm2-135m-instruct"
PROMPTS = json.loads((MINIATURE / "prompts.json").read_text())
JACOBI = {
    "speculative_config": {
        "method": "custom_class",
        "model": "hf_jacobi.serving.vllm.JacobiProposer",
        "num_speculative_tokens": 15,
    },
    "worker_extension_cls": "hf_jacobi.serving.vllm.JacobiWorker",
}
FIXED = {"block_size": 16, "window": "sliding", "adaptive": False, "pool_size": 0}


class Served:
    """An engine: its texts, and its tokens per forward."""

    def __init__(self, model, **arguments):
        from vllm import LLM

        defaults = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True, "seed": 0}
        self.llm = LLM(str(model), **defaults | arguments)

    def stats(self) -> dict[str, float]:
        return self.llm.collective_rpc("jacobi_stats")[0]

    def outputs(self, prompts, **sampling) -> list:
        """vLLM's outputs for texts, or for lists of tokens."""
        from vllm import SamplingParams

        prompts = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        chosen = SamplingParams(**{"temperature": 0, "max_tokens": 120} | sampling)
        return [out.outputs[0] for out in self.llm.generate(prompts, chosen, use_tqdm=False)]

    def write(self, prompts, **sampling) -> list[list[int]]:
        return [list(output.token_ids) for output in self.outputs(prompts, **sampling)]

    def counted(self, prompts, **sampling) -> tuple[list[list[int]], float]:
        """The texts, and TPF."""
        before = self.stats()
        texts = self.write(prompts, **sampling)
        after = self.stats()
        return texts, tokens_per_forward(sum(map(len, texts)), {name: after[name] - before[name] for name in before})

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def served():
    """A function that starts an engine, or returns the one with the same arguments."""
    running: dict[str, Served] = {}

    def start(model, **arguments) -> Served:
        key = f"{model} {sorted(arguments.items())}"
        if key not in running:
            running[key] = Served(model, **arguments)
        return running[key]

    yield start
    for engine in running.values():
        engine.stop()


@pytest.fixture(scope="module")
def jacobi(served) -> Served:
    return served(MINIATURE, **JACOBI)


@pytest.fixture(scope="module")
def ar(served) -> Served:
    return served(MINIATURE)


def reference(model, prompts: list[list[int]], new_tokens: int, **kwargs) -> list:
    """What `generate` of transformers returns for each prompt."""
    return [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            **kwargs,
        )
        for prompt in prompts
    ]


def greedy(model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    outputs = reference(model, prompts, new_tokens, decoding="ar")
    return [out.sequences[0, len(prompt) :].tolist() for out, prompt in zip(outputs, prompts)]


def load(path) -> tuple:
    return hf_jacobi.enable(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)), tokenizer_of(path)


def tokenizer_of(path):
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def copy_folder(tmp_path_factory):
    """The permuted-copy fixture as a checkpoint: whole blocks are predicted at once, n-grams rarely repeat."""
    folder = tmp_path_factory.mktemp("permuted_copy")
    permuted_copy_model().save_pretrained(folder)
    return folder


COPY = {"max_model_len": 500, "skip_tokenizer_init": True}


@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
def test_miniature_greedy_text_is_that_of_transformers(jacobi, together):
    model, tokenizer = load(MINIATURE)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    expected = greedy(model, prompts, 200)
    if together:
        texts, tpf = jacobi.counted(prompts, max_tokens=200)
        assert texts == expected and tpf > 4
    else:
        for prompt, text in zip(prompts, expected):
            assert jacobi.write([prompt], max_tokens=200) == [text]


def test_smollm2_greedy_text_is_that_of_transformers(served):
    if not SMOLLM2.exists():
        pytest.skip("SmolLM2 has not been unpacked: hf-jacobi demo --base")
    model, tokenizer = load(SMOLLM2)
    copied = "Anna has a cat. Ben has a dog. Clara has a horse. David has a bird. Emma has a fish."
    chats = [f"Copy this text exactly: {copied}", "What is the capital of France?", "Describe the water cycle."]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": chat}], add_generation_prompt=True)["input_ids"]
        for chat in chats
    ]
    engine = served(SMOLLM2, **JACOBI, additional_config={"jacobi": FIXED})
    texts, tpf = engine.counted(prompts, max_tokens=64)
    assert texts == greedy(model, prompts, 64)
    assert tpf > 1.1


def test_permuted_copies_are_decoded_by_own_predictions(served, copy_folder):
    model = hf_jacobi.enable(permuted_copy_model())
    prompts = permuted_copy_batch(6, 40, torch.Generator().manual_seed(1)).tolist()
    engine = served(copy_folder, **COPY, **JACOBI, additional_config={"jacobi": FIXED})
    texts, tpf = engine.counted(prompts, max_tokens=200, detokenize=False)
    assert texts == greedy(model, prompts, 200)
    assert tpf > 6


@pytest.mark.parametrize("draft_init", ["prompt", "ngram"])
def test_as_many_forwards_as_generate(served, copy_folder, draft_init):
    settings = FIXED | {"draft_init": draft_init}
    model = hf_jacobi.enable(permuted_copy_model())
    prompts = permuted_copy_batch(4, 40, torch.Generator().manual_seed(2)).tolist()
    engine = served(copy_folder, **COPY, **JACOBI, additional_config={"jacobi": settings})
    before = engine.stats()
    texts = [engine.write([prompt], max_tokens=200, detokenize=False)[0] for prompt in prompts]
    after = engine.stats()
    outputs = reference(model, prompts, 200, decoding="jacobi", jacobi_config=settings)
    assert texts == [out.sequences[0, 40:].tolist() for out in outputs]
    forwards = sum(after[name] - before[name] for name in ("requests", "drafts"))
    expected = sum(out.jacobi_stats.forwards for out in outputs)
    assert abs(forwards - expected) <= 0.02 * expected
    assert expected < 100 * len(prompts)


def test_more_requests_than_fit_into_a_batch(jacobi, ar):
    prompts = [PROMPTS[number % 4].replace("40", str(number)) for number in range(30)]
    texts, tpf = jacobi.counted(prompts, max_tokens=60)
    assert texts == ar.write(prompts, max_tokens=60)
    assert tpf > 3


def test_chunked_prefill(served, ar):
    engine = served(MINIATURE, **JACOBI, max_num_batched_tokens=160, enable_chunked_prefill=True)
    prompts = [PROMPTS[0] + PROMPTS[number % 4] * 2 for number in range(10)]
    texts, tpf = engine.counted(prompts, max_tokens=60)
    assert texts == ar.write(prompts, max_tokens=60)
    assert tpf > 2


def test_preemption(served, ar):
    """A cache so small that requests are preempted and processed again."""
    engine = served(MINIATURE, **JACOBI, num_gpu_blocks_override=14, enable_prefix_caching=False)
    texts, tpf = engine.counted(PROMPTS * 2, max_tokens=150)
    assert texts == ar.write(PROMPTS * 2, max_tokens=150)
    assert tpf > 3


def test_a_prompt_that_is_cached(jacobi, ar):
    long = "".join(PROMPTS[:2])
    first, again = jacobi.write([long]), jacobi.write([long])
    assert first == again == ar.write([long])


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 17, 50])
def test_requests_end_inside_a_draft(jacobi, ar, new_tokens):
    texts = jacobi.write(PROMPTS, max_tokens=new_tokens, ignore_eos=True)
    assert texts == ar.write(PROMPTS, max_tokens=new_tokens, ignore_eos=True)
    assert {len(text) for text in texts} == {new_tokens}


def test_text_to_the_end_of_the_model(jacobi, ar):
    long = [PROMPTS[0] * 3, PROMPTS[1]]
    texts = jacobi.write(long, max_tokens=511, ignore_eos=True)
    assert texts == ar.write(long, max_tokens=511, ignore_eos=True)


@pytest.mark.parametrize("stop", [["."], ["SELECT", " 4"], ["\n"]])
@pytest.mark.parametrize("kept", [True, False])
def test_stop_strings(jacobi, ar, stop, kept):
    settings = {"stop": stop, "include_stop_str_in_output": kept, "max_tokens": 100}
    mine, theirs = jacobi.outputs(PROMPTS, **settings), ar.outputs(PROMPTS, **settings)
    assert [(out.text, out.finish_reason, out.stop_reason) for out in mine] == [
        (out.text, out.finish_reason, out.stop_reason) for out in theirs
    ]
    assert any(out.finish_reason == "stop" and out.stop_reason in stop for out in mine)


def test_logprobs(jacobi, ar):
    mine, theirs = (engine.outputs(PROMPTS, logprobs=3, max_tokens=60) for engine in (jacobi, ar))
    for own, other in zip(mine, theirs):
        assert list(own.token_ids) == list(other.token_ids)
        assert len(own.logprobs) == len(own.token_ids)
        for step, expected, token in zip(own.logprobs, other.logprobs, own.token_ids):
            assert token in step
            assert step[token].logprob == pytest.approx(expected[token].logprob, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.2}, {"presence_penalty": 0.8, "frequency_penalty": 0.3}, {"min_tokens": 80}],
    ids=lambda settings: next(iter(settings)),
)
def test_penalties(jacobi, ar, settings):
    texts, tpf = jacobi.counted(PROMPTS, **settings)
    assert texts == ar.write(PROMPTS, **settings)
    assert tpf > 1


STRUCTURES = {
    "choice": {"choice": ["apples and pears and plums", "apples and pears or plums"]},
    "regex": {"regex": r"SELECT [a-z]+, [a-z]+ FROM [a-z]+ WHERE [a-z]+ = '[a-z]+' ORDER BY [a-z]{1,9};"},
    "json": {
        "json": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}
    },
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structured_output(jacobi, ar, kind):
    from vllm.sampling_params import StructuredOutputsParams

    mine, theirs = (
        engine.outputs(PROMPTS, structured_outputs=StructuredOutputsParams(**STRUCTURES[kind]), max_tokens=80)
        for engine in (jacobi, ar)
    )
    assert [out.text for out in mine] == [out.text for out in theirs]
    if kind == "choice":
        assert all(out.text in STRUCTURES["choice"]["choice"] for out in mine)


@pytest.mark.parametrize("seed", [3, None])
def test_sampled_text_takes_fewer_forwards_too(jacobi, seed):
    texts, tpf = jacobi.counted(PROMPTS, temperature=0.7, seed=seed, max_tokens=100)
    assert tpf > 2 and all(texts)


def test_sampling_without_heat_is_greedy(jacobi, ar):
    """In one batch with greedy requests; vLLM's own sampler for drafts divides by noise on a CPU."""
    from vllm import SamplingParams

    settings = [SamplingParams(temperature=heat, max_tokens=80, top_k=5) for heat in (1e-4, 0.0, 1e-4, 1e-4)]
    outputs = jacobi.llm.generate(PROMPTS, settings, use_tqdm=False)
    assert [list(out.outputs[0].token_ids) for out in outputs] == ar.write(PROMPTS, max_tokens=80)


def test_sampled_tokens_are_as_frequent_as_the_model_says(jacobi, ar):
    """The third token of 400 texts, for which drafts are verified, at a high temperature."""
    settings = {"temperature": 2.0, "max_tokens": 3, "ignore_eos": True}
    counts = [[0] * 512 for _ in range(2)]
    for engine, count in zip((jacobi, ar), counts):
        for text in engine.write([PROMPTS[1]] * 400, **settings):
            count[text[1]] += 1
    distance = sum(abs(a - b) for a, b in zip(*counts)) / 800
    assert distance < 0.25, "two samples of 400 from the same distribution differ by about 0.1"


def test_cancelled_requests_leave_the_others_as_they_are(jacobi, ar):
    from vllm import SamplingParams

    engine = jacobi.llm.llm_engine
    draw, done = random.Random(1), {}
    prompts = {f"r{number}": PROMPTS[number % 4] for number in range(24)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=100))
    waiting = list(prompts)
    cancelled = set(waiting[::3])
    while engine.has_unfinished_requests():
        for out in engine.step():
            if out.finished:
                done[out.request_id] = list(out.outputs[0].token_ids)
        if cancelled and draw.random() < 0.4:
            engine.abort_request([cancelled.pop()])
    expected = dict(zip(prompts, ar.write(list(prompts.values()), max_tokens=100)))
    assert set(waiting[1::3]) | set(waiting[2::3]) <= set(done)
    assert all(text == expected[name] for name, text in done.items() if name not in waiting[::3])


@pytest.mark.parametrize(
    ("speculative", "arguments"),
    [
        ({"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 3.0}, {}),
        ({}, {"additional_config": {"jacobi": {"block": 3}}}),
    ],
    ids=["synthetic", "unknown setting"],
)
def test_what_is_refused_does_not_start(speculative, arguments):
    chosen = JACOBI | {"speculative_config": JACOBI["speculative_config"] | speculative} | arguments
    with pytest.raises(Exception, match="Engine core"):
        Served(MINIATURE, **chosen)
