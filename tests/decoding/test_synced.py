"""`synced_gpus=True`: every process of a group runs as many forwards as the one that needs the most."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import padded_prompts, tiny_model

import hf_jacobi


SETTINGS = [  # the rows of the first process end at different times, those of the second together
    {"max_new_tokens": 16, "do_sample": False, "eos_token_id": list(range(0, 96, 8))},
    {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None},
]


def count_forwards(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = hf_jacobi.enable(tiny_model("llama"))
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    out = model.generate(
        **padded_prompts(3, seed=rank),
        **SETTINGS[rank],
        decoding="jacobi",
        synced_gpus=True,
        return_dict_in_generate=True,
    )
    torch.save((len(forwards), out.sequences), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.multiprocess
def test_processes_run_the_same_number_of_forwards(tmp_path):
    mp.spawn(count_forwards, args=(free_port(), str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert results[0][0] == results[1][0] > 4
    assert results[1][1].shape[1] == 12 + 24
    model = tiny_model("llama")
    for rank, (_, text) in enumerate(results):
        assert torch.equal(text, model.generate(**padded_prompts(3, seed=rank), **SETTINGS[rank]))
