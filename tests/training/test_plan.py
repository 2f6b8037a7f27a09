"""The collator derives once what training needs from a batch, not on the batch's device."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from datasets import IterableDataset
from models import tiny_model
from packed_rows import packed
from test_evaluation import BACKEND, on_processes
from test_trainer import assert_same, gradients_of_a_step, lora, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode

from hf_jacobi.training.collator import PLAN, PackedCollator, Planner
from hf_jacobi.training.windows import FIELDS


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


class NoReads(TorchDispatchMode):
    """Fails where Python would wait for a device: when it reads numbers, or when shapes depend on values."""

    READS = ("nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero", "unique", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not any(name == read or name.startswith((f"{read}_", f"_{read}")) for read in self.READS), name
        if name.startswith(("index", "_index")):  # indexing by booleans
            indices = [one for arg in args if isinstance(arg, (list, tuple)) for one in arg if one is not None]
            assert not any(index.dtype == torch.bool for index in indices), name
        return function(*args, **kwargs or {})


@contextmanager
def no_reads(monkeypatch):
    """Also catches `tolist`, which is not dispatched; the table of segments is on the host and can be read."""
    tolist = torch.Tensor.tolist

    def guarded(tensor):
        assert tensor.shape[-1:] == (FIELDS,), "a tensor of the device is read"
        return tolist(tensor)

    with monkeypatch.context() as patch, NoReads():
        patch.setattr(torch.Tensor, "tolist", guarded)
        yield


def test_the_guard_sees_reads(monkeypatch):
    """Those of a plan that is made where no device may be read."""
    batch = PackedCollator(0)(packed(2))
    with no_reads(monkeypatch), pytest.raises(AssertionError):
        Planner()(batch)
    for read in (
        bool,
        int,
        float,
        torch.Tensor.item,
        torch.nonzero,
        lambda one: one[one > 0],
        lambda one: one.tolist(),
    ):
        with no_reads(monkeypatch), pytest.raises(AssertionError):
            read(torch.ones(1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accept_cut": True, "consistency_loss": "lk", "block_position_weight": 0.9, "within_block": True},
        {"adapter": True},
        {"adapter": True, "adapter_scope": "draft"},
        {"adapter": True, "adapter_scope": "draft", "in_one_forward": True},
        {"activation_checkpointing": True},
    ],
)
def test_a_step_reads_nothing_of_its_device(tmp_path, monkeypatch, settings, attention):
    """PEFT's own way to apply a draft-only adapter does this; that of `NoisyTokens` does not."""
    settings = dict(settings)
    one_forward = settings.pop("in_one_forward", False)
    adapter = {"peft_config": lora()} if settings.pop("adapter", False) else {}
    trainer = trainer_of(tiny_model(attention=attention), tmp_path, loss_chunk_size=16, **adapter, **settings)
    if one_forward:
        trainer.text_once, trainer.planner.text_once = None, False
    trainer.model.train()
    batches, counts = trainer.get_batch_samples(iter([trainer.data_collator(packed(3))]), 1, torch.device("cpu"))
    with trainer._one_batch(), no_reads(monkeypatch):
        trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=counts).backward()
    trainer.model.eval()
    with trainer._one_batch(), torch.no_grad(), no_reads(monkeypatch):
        trainer.compute_loss(trainer.model, batches[0])


def test_a_plan_goes_to_the_device_with_its_batch():
    from accelerate.utils import send_to_device

    batch = send_to_device(PackedCollator(0, planner=Planner(windowed=True))(packed(2)), torch.device("meta"))
    targets = batch[PLAN].targets
    names = ("clean", "labels", "noisy", "twins", "blocks", "places", "present")
    assert {getattr(targets, name).device.type for name in names} == {"meta"}
    assert batch[PLAN].segments.device.type == "cpu", "it is read on the host"


class Own:
    """A user's own collator."""

    def __call__(self, some):
        return PackedCollator(pad_token_id=0)(some)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"accelerator_config": {"split_batches": True}},
        {"data": "stream"},
        {"data_collator": Own()},
        {"data_collator": Own(), "within_block": True},
        {"within_block": True},
    ],
)
def test_every_way_to_load_batches_gives_the_same_step(tmp_path, settings):
    settings = dict(settings)
    within = {"within_block": True} if settings.get("within_block") else {}
    expected = gradients_of_a_step(tmp_path, **within)
    if within:
        without = gradients_of_a_step(tmp_path)
        assert any(not torch.allclose(without[name], value) for name, value in expected.items())
    if settings.get("data") == "stream":
        settings["data"] = IterableDataset.from_generator(lambda: iter(packed(8)))
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert_same(gradients_of_a_step(tmp_path, **settings), expected)


def on_a_stream(folder) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in gradients_of_a_step(
        folder, data=IterableDataset.from_generator(partial(packed, 8)), per_device_train_batch_size=4, **BACKEND
    ).items()}  # fmt: skip


@pytest.mark.multiprocess
def test_processes_share_a_stream(tmp_path):
    """Rows of different lengths; by itself, accelerate would let one process read and join them for all."""
    two = {name.removeprefix("module."): torch.tensor(value) for name, value in
           on_processes(2, "on_a_stream", tmp_path, module="test_plan").items()}  # fmt: skip
    one = gradients_of_a_step(tmp_path)
    assert_same(two, {name: value.flatten() for name, value in one.items()})
