"""The base model of the miniature: a small Llama with its own tokenizer, trained from scratch on worked solutions."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from .problems import Problem
from .tasks import training_problems


VOCABULARY = 512
TOKENIZER_PROBLEMS = 6000


def make_tokenizer(problems: list[Problem]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with each digit as a separate token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([problem.prompt + problem.completion for problem in problems], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast):
    """3.5 million random parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def encode(tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> datasets.Dataset:
    """One row per problem: `input_ids`, and `labels` for the completion and its end only."""

    def rows():
        for problem in problems:
            prompt = tokenizer(problem.prompt)["input_ids"]
            completion = [*tokenizer(problem.completion)["input_ids"], tokenizer.eos_token_id]
            yield {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    return datasets.Dataset.from_list(list(rows()))


def train_base(folder: Path, problems: int, batch_size: int = 16, learning_rate: float = 1.5e-3) -> None:
    """
    Trains the base model into `folder`, which also gets the tokenizer; an interrupted training resumes.

    Args:
        folder: where the checkpoint is written.
        problems: the training problems, each seen once.
        batch_size: problems per step.
        learning_rate: the peak rate; it falls to zero along a cosine.
    """
    set_seed(0)
    data = training_problems(problems, "base")
    tokenizer = make_tokenizer(data[:TOKENIZER_PROBLEMS])
    arguments = TrainingArguments(
        output_dir=str(folder / "training"),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        max_grad_norm=1.0,
        adam_beta2=0.98,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=bool(shutil.which("g++")),  # nearly twice as fast on a CPU
        train_sampling_strategy="group_by_length",
        logging_steps=25,
        save_steps=500,
        save_total_limit=1,
        report_to="none",
        seed=0,
    )
    trainer = Trainer(
        model=make_model(tokenizer),
        args=arguments,
        train_dataset=encode(tokenizer, data),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest"),
    )
    trainer.train(resume_from_checkpoint=(folder / "training").is_dir() and get_last_checkpoint(folder / "training"))
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(folder / "training")
