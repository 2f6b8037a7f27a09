"""`synced_gpus=True`: every process of a group runs as many forwards as the one that needs most."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import padded_prompts, tiny_model

import hf_jacobi


def count_forwards(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = hf_jacobi.enable(tiny_model("llama"))
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    inputs = padded_prompts(1, seed=rank)
    kwargs = {"max_new_tokens": (4, 24)[rank], "do_sample": False, "eos_token_id": None}
    out = model.generate(**inputs, **kwargs, decoding="jacobi", synced_gpus=True)
    torch.save((len(forwards), out), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_processes_run_the_same_number_of_forwards(tmp_path):
    mp.spawn(count_forwards, args=(free_port(), str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert results[0][0] == results[1][0] > 4
    assert [text.shape[1] for _, text in results] == [16, 36]
    model = tiny_model("llama")
    for rank, (_, text) in enumerate(results):
        kwargs = {"max_new_tokens": (4, 24)[rank], "do_sample": False, "eos_token_id": None}
        assert torch.equal(text, model.generate(**padded_prompts(1, seed=rank), **kwargs))
