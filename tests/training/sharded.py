"""FSDP 2 and DeepSpeed on processes without a GPU, where accelerate by itself does not allow them."""

from __future__ import annotations

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


ENVIRONMENT = {  # what `accelerate launch --config_file examples/fsdp.yaml` sets
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def shard() -> None:
    """Makes accelerate shard the models that it prepares from now on."""
    os.environ.update(ENVIRONMENT)
    made = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.num_processes > 1:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


def with_zero(stage: int) -> dict:
    """
    Makes accelerate train with DeepSpeed from now on.

    Args:
        stage: of ZeRO, 2 or 3.

    Returns:
        the arguments of the training that say so.
    """
    os.environ.pop("ACCELERATE_USE_CPU", None)  # which would make it leave DeepSpeed out
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    config = {"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}}
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    config |= dict.fromkeys(sizes, "auto") | {"zero_allow_untested_optimizer": True}
    config["zero_force_ds_cpu_optimizer"] = False
    return {"deepspeed": config, "use_cpu": False, "accelerator_config": {"use_configured_state": True}}
