"""The configuration files in examples/ are read by the tools they are for."""

from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["fsdp.yaml", "deepspeed_zero3.yaml"])
def test_accelerate_reads_them(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / name))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    assert config.distributed_type.value in ("FSDP", "DEEPSPEED")


@pytest.mark.parametrize("name", ["lora.yaml", "draft_only.yaml"])
def test_the_trainer_reads_them(name, tmp_path):
    pytest.importorskip("trl")
    from trl import ModelConfig, TrlParser, get_peft_config

    from hf_jacobi import JacobiForcingConfig

    parser = TrlParser((JacobiForcingConfig, ModelConfig))
    arguments = ["--config", str(EXAMPLES / name), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    training, model = parser.parse_args_and_config(args=arguments)
    assert get_peft_config(model).r == 32
    assert training.adapter_scope == ("draft" if name.startswith("draft") else "all")
