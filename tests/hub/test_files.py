"""Which files of a folder are published, and which folders are refused."""

import json
import os
import shutil

import pytest
import torch
from checkpoints import change, checkpoint
from models import tiny_model, tiny_tokenizer, trained_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_jacobi
from hf_jacobi.decoding.errors import UsageError
from hf_jacobi.hub.files import choose


GENERATED = {"README.md", "jacobi_forcing.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
CHECKPOINT = {"config.json", "generation_config.json", "model.safetensors"} | TOKENIZER
PLANTED = (
    ".env",
    ".gitattributes",
    ".netrc",
    ".git/config",
    ".cache/huggingface/token",
    "id_rsa",
    "token",
    "keys.py",
    "keys.json",
    "train.py",
    "modeling_old.py",
    "config.yaml",
    "config_backup.json",
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "checkpoint-5/model.safetensors",
    "runs/events.out",
    "custom_generate/.env",
    "custom_generate/keys.py",
    "old.safetensors",
    "model_old.safetensors",
    "model-00001-of-00009.safetensors",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.tmp",
    "pytorch_model-00001-of-00002.bin",
    "adapter_model.bin",
    "adapter_model.safetensors",
    "tokenizer_notes.txt",
    "tokenizer-training.log",
    "tokenizer_corpus/private.txt",
    "tokenizer_corpus/.env",
    "tokenizer.json.bak",
    "chat_template_drafts.md",
    "chat_templates_old/a.jinja",
    "additional_chat_templates/.env",
    "additional_chat_templates/.hidden.jinja",
    "additional_chat_templates/notes.md",
    "additional_chat_templates/old/a.jinja",
    "vocab.corpus.txt",
    "secret.model",
    "secret.tiktoken",
    "LICENSE-internal-contract.docx",
    "NOTICE.old",
    "nohup.out",
    "wandb/run.json",
)


def publish(source, target, **settings):
    return hf_jacobi.publish(source, "someone/fast", None, target, dry_run=True, **settings)


def published(source, tmp_path) -> set[str]:
    """The names of the published files, without the generated ones."""
    folder = tmp_path / "pushed"
    publish(source, folder)
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    return {name for name in names if not name.startswith("custom_generate/")} - GENERATED


def plant(folder, names) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("SECRET")


def test_none_of_what_is_planted_beside_a_checkpoint_is_published_and_the_rest_decodes(tmp_path):
    source = checkpoint(tmp_path / "out")
    trained_model().save_pretrained(source)
    plant(source, PLANTED)
    links = {
        "tokenizer_link.json": "/etc/passwd",
        "vocab.link": "/etc/hosts",
        "corpus": "/etc",
        "model.link": "nowhere",
    }
    for name, target in links.items():
        (source / name).symlink_to(target)
    os.mkfifo(source / "tokenizer.pipe")
    assert len(PLANTED) + len(links) >= 40
    said = []
    folder = publish(source, tmp_path / "pushed", tell=said.append)
    files = [file for file in (tmp_path / "pushed").rglob("*") if not file.is_dir()]
    assert not [file for file in files if b"SECRET" in file.read_bytes() or file.is_symlink()]
    names = {file.name for file in files if file.parent.name != "custom_generate"}
    assert names == CHECKPOINT | GENERATED
    assert not {"keys.py", ".env"} & {file.name for file in files}
    stays = said[-1]
    assert all(name.split("/")[0] in stays for name in (*PLANTED, *links) if not name.startswith("custom_generate"))
    model = hf_jacobi.enable(AutoModelForCausalLM.from_pretrained(folder))
    inputs = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    call = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 24, "do_sample": False}
    jacobi = {"decoding": "jacobi", "jacobi_config": {"position_cost": 0.01}, "return_dict_in_generate": True}
    out = model.generate(inputs, **call, **jacobi)
    assert torch.equal(out.sequences, model.generate(inputs, **call, decoding="ar"))
    assert out.jacobi_stats.tokens_per_forward > 1
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer().get_vocab()


def test_what_goes_is_said_with_its_size_before_it_goes(tmp_path):
    source = checkpoint(tmp_path / "out")
    said = []
    folder = tmp_path / "pushed"
    publish(source, folder, tell=said.append)
    assert said[0] == "what goes to someone/fast:"
    listed = {line[9:].strip() for line in said[1:]}
    assert listed == {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    size = (source / "model.safetensors").stat().st_size
    assert next(line for line in said if "model.safetensors" in line).split()[:2] == [f"{size / 1000:.4g}", "kB"]


def test_the_shards_that_the_index_names_go_and_older_ones_stay(tmp_path):
    source = checkpoint(tmp_path / "out", max_shard_size="20kB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    shutil.copy(source / min(shards), source / "model-00001-of-00099.safetensors")
    shards |= {"model.safetensors.index.json"}
    assert published(source, tmp_path) == CHECKPOINT - {"model.safetensors"} | shards
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pushed").num_parameters() == tiny_model().num_parameters()


def test_of_two_layouts_that_goes_which_transformers_loads(tmp_path):
    source = checkpoint(tmp_path / "out", max_shard_size="20kB")
    save_file(tiny_model(seed=5).state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    torch.save({"other": torch.ones(1)}, source / "pytorch_model.bin")
    assert published(source, tmp_path) == CHECKPOINT


def test_an_adapter_beside_a_whole_model_is_published_as_an_adapter(tmp_path):
    source = checkpoint(tmp_path / "out")
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(source)
    names = published(source, tmp_path)
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names, (
        "transformers loads the adapter, too"
    )
    (source / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights of an adapter"):
        choose(source)


def test_weights_of_pickles_are_published(tmp_path):
    source = checkpoint(tmp_path / "out")
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    for settings in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(weights, source / "pytorch_model.bin", **settings)
        assert "pytorch_model.bin" in choose(source).files


def pointer(file):
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n")


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def empty(file):
    file.write_bytes(b"")


def add(file):
    file.write_bytes(file.read_bytes() + b"more")


def junk(file):
    file.write_bytes(b"this is no such file" * 20)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", pointer, "git lfs pull"),
        ("model.safetensors", cut, "contains no readable weights"),
        ("model.safetensors", add, "contains no readable weights"),
        ("model.safetensors", junk, "contains no readable weights"),
        ("model.safetensors", empty, "is empty"),
        ("model.safetensors", lambda file: save_file({}, file), "contains no weights at all"),
        ("tokenizer.json", pointer, "git lfs pull"),
        ("tokenizer.json", cut, "tokenizer.json is not a JSON file"),
        ("tokenizer.json", empty, "is empty"),
        ("config.json", cut, "config.json is not a JSON file"),
        ("config.json", lambda file: file.write_text("[]"), "config.json must hold a JSON object"),
        ("config.json", lambda file: file.write_bytes(b'{"a": "\xff"}'), "config.json is not a JSON file"),
        ("generation_config.json", cut, "generation_config.json is not a JSON file"),
        ("generation_config.json", lambda file: file.write_text('{"decoding": "fast"}'), "`decoding` must be one of"),
        ("tokenizer_config.json", cut, "tokenizer_config.json is not a JSON file"),
        ("evaluation.json", lambda file: file.write_text("{"), "evaluation.json is not a JSON file"),
        ("evaluation.json", lambda file: file.write_text("{}"), "evaluation.json: an evaluation has"),
        ("jacobi_forcing.json", lambda file: file.write_text("{"), "jacobi_forcing.json is not a JSON file"),
        ("jacobi_forcing.json", lambda file: file.write_text('{"settings": 1}'), "`settings` is 1"),
        ("jacobi_forcing.json", lambda file: file.write_text('{"figures": {"a": "x"}}'), "must contain numbers"),
        ("jacobi_forcing.json", lambda file: file.write_text('{"remark": []}'), "`remark` is"),
        ("tokenizer.json", lambda file: file.write_text("{}"), "the tokenizer cannot be loaded"),
    ],
)
def test_what_is_damaged_is_refused_by_name_and_nothing_is_written(tmp_path, name, damage, message):
    source = checkpoint(tmp_path / "out")
    damage(source / name)
    with pytest.raises(hf_jacobi.UsageError, match=message):
        publish(source, tmp_path / "pushed")
    assert {file.name for file in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("damage", [pointer, cut, empty, junk, lambda file: torch.save([1], file)])
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_are_refused(tmp_path, damage, zipped):
    source = checkpoint(tmp_path / "out")
    (source / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    choose(source)
    damage(source / "pytorch_model.bin")
    with pytest.raises(hf_jacobi.UsageError, match=r"pytorch_model\.bin (is|contains)"):
        choose(source)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    source = checkpoint(tmp_path / "out")
    (source / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(hf_jacobi.UsageError, match="no readable weights"):
        choose(source)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "has no `weight_map`"),
        ({}, "has no `weight_map`"),
        ({"a": 1}, "has no `weight_map`"),
        ({"a": "gone.safetensors"}, "gone.safetensors, which does not exist"),
        ({"a": "../other.safetensors"}, "not a weights file"),
        ({"a": "/etc/passwd"}, "not a weights file"),
        ({"a": "sub/other.safetensors"}, "not a weights file"),
        ({"a": ".env"}, "not a weights file"),
        ({"a": ".hidden.safetensors"}, "not a weights file"),
        ({"a": "id_rsa"}, "not a weights file"),
        ({"no.such.weight": "model-00001-of-00002.safetensors"}, "lacks no.such.weight"),
    ],
)
def test_an_index_that_names_what_is_not_there_is_refused(tmp_path, weight_map, message):
    source = checkpoint(tmp_path / "out")
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    plant(source, ["id_rsa", ".env", ".hidden.safetensors", "sub/other.safetensors"])
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(hf_jacobi.UsageError, match=message):
        choose(source)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "spiece.model", "LICENSE"])
def test_links_are_refused(tmp_path, name):
    source = checkpoint(tmp_path / "out")
    (source / name).unlink(missing_ok=True)
    for target in ("/etc/passwd", source / "tokenizer_config.json", "nowhere", name):
        (source / name).symlink_to(target)
        with pytest.raises(hf_jacobi.UsageError, match=f"{name} is a link"):
            choose(source)
        (source / name).unlink()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "LICENSE", "additional_chat_templates/a.jinja"])
@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir])
def test_a_name_that_is_no_file_is_refused(tmp_path, name, kind):
    source = checkpoint(tmp_path / "out")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).unlink(missing_ok=True)
    kind(source / name)
    with pytest.raises(hf_jacobi.UsageError, match="is not a regular file"):
        choose(source)


def test_a_folder_of_chat_templates_that_is_a_link_is_refused(tmp_path):
    source = checkpoint(tmp_path / "out")
    plant(tmp_path, ["private/a.jinja"])
    (source / "additional_chat_templates").symlink_to(tmp_path / "private")
    with pytest.raises(hf_jacobi.UsageError, match="folder of chat templates"):
        choose(source)


def cached(tmp_path, source):
    """The folder as a snapshot in the Hub's cache: links into `blobs`."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(source.iterdir()):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_published(tmp_path):
    snapshot = cached(tmp_path, checkpoint(tmp_path / "out"))
    assert published(snapshot, tmp_path) == CHECKPOINT
    assert not any(file.is_symlink() for file in (tmp_path / "pushed").rglob("*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "pushed")


def test_what_only_looks_like_a_snapshot_is_not_followed(tmp_path):
    snapshot = cached(tmp_path, checkpoint(tmp_path / "out"))
    blobs = snapshot.parents[1] / "blobs"
    plant(blobs, ["keys"])
    (blobs / f"{99:040x}").symlink_to("/etc/passwd")
    for target in ("../../blobs/keys", f"../../blobs/{99:040x}", "../../../other/blobs/x", "config.json"):
        (snapshot / "LICENSE").symlink_to(target)
        if target == "config.json":  # itself a link into `blobs`
            assert "LICENSE" in choose(snapshot).files
        else:
            with pytest.raises(hf_jacobi.UsageError, match="is a link"):
                choose(snapshot)
        (snapshot / "LICENSE").unlink()


def with_code(folder, **files):
    """A checkpoint with its own code; the modules by name."""
    checkpoint(folder)
    for name, code in files.items():
        (folder / f"{name}.py").write_text(code)
    return folder


def test_own_code_goes_with_what_it_imports_beside_it(tmp_path):
    source = with_code(
        tmp_path / "out",
        modeling_own="from .layers_own import Layer\nfrom .configuration_own import Config\n",
        layers_own="from .maths import add\n",
        configuration_own="import .maths\n",
        maths="",
        tokenization_own="",
        keys="TOKEN = 'SECRET'",
    )
    change(source / "config.json", auto_map={"AutoConfig": "configuration_own.C", "AutoModel": "x/y--elsewhere.M"})
    change(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoModel": "x/y--other.M"})
    change(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.T", None]})
    code = {"modeling_own.py", "layers_own.py", "configuration_own.py", "maths.py", "tokenization_own.py"}
    assert published(source, tmp_path) == CHECKPOINT | code


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "reference",
    ["{outside}/keys.K", "../keys.K", "sub/keys.K", "sub\\keys.K", ".hidden.K", "gone.K", "linked.K", "keys", 5],
)
def test_code_outside_the_folder_is_refused(tmp_path, where, reference):
    source = checkpoint(tmp_path / "out")
    plant(tmp_path, ["keys.py", "out/sub/keys.py", "out/.hidden.py", "out/sub\\keys.py"])
    (source / "linked.py").symlink_to(tmp_path / "keys.py")
    (source / where).touch()
    reference = reference.format(outside=tmp_path) if isinstance(reference, str) else reference
    (source / where).write_text(json.dumps({"auto_map": {"AutoConfig": reference}}))
    with pytest.raises(hf_jacobi.UsageError, match=r"no such file beside it|is a link|must contain strings"):
        publish(source, tmp_path / "pushed")
    assert not (tmp_path / "pushed").exists()


@pytest.mark.parametrize("line", ["from ..keys import K", "from ./{outside}/keys import K", "from .sub/keys import K"])
def test_imports_outside_the_folder_are_refused(tmp_path, line):
    source = with_code(tmp_path / "out", modeling_own=line.format(outside=tmp_path))
    plant(tmp_path, ["keys.py", "out/sub/keys.py", "out/.keys.py"])
    change(source / "config.json", auto_map={"AutoModel": "modeling_own.Own"})
    with pytest.raises(hf_jacobi.UsageError, match="no such file beside it"):
        choose(source)


def test_names_that_differ_in_case_alone_are_refused(tmp_path):
    source = with_code(tmp_path / "out", modeling_own="", Modeling_Own="")
    change(source / "config.json", auto_map={"AutoModel": "modeling_own.A", "AutoConfig": "Modeling_Own.B"})
    with pytest.raises(hf_jacobi.UsageError, match="ignore case"):
        choose(source)


def test_processors_licenses_and_templates_go(tmp_path):
    source = checkpoint(tmp_path / "out")
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        (source / name).write_text("{}")
    others = {"LICENSE", "NOTICE.txt", "USE_POLICY.md", "additional_chat_templates/tool.jinja"}
    plant(source, others)
    others |= {"preprocessor_config.json", "processor_config.json", "chat_template.json"}
    assert published(source, tmp_path) == CHECKPOINT | others


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(hf_jacobi.UsageError, match="there is no folder"):
        choose(tmp_path / "nowhere")
    with pytest.raises(hf_jacobi.UsageError, match="is empty: pass a name"):
        hf_jacobi.publish("", "someone/fast")
    with pytest.raises(hf_jacobi.UsageError, match="other weights"):
        source = checkpoint(tmp_path / "out")
        change(source / "config.json", transformers_weights="other.safetensors")
        choose(source)


@pytest.mark.parametrize("where", ["/home/you/code", "../code", "~/code", "./code", ""])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_in_a_place_of_this_machine_is_refused(tmp_path, where, name):
    source = checkpoint(tmp_path / "model")
    change(source / name, auto_map={"AutoConfig": f"{where}--keys.K"})
    with pytest.raises(UsageError, match="which others cannot load"):
        choose(source)
    change(source / name, auto_map={"AutoConfig": "someone/code--keys.K"})
    assert not any(file.endswith(".py") for file in choose(source).files)


def test_a_name_of_code_without_a_class_is_told_as_such(tmp_path):
    source = checkpoint(tmp_path / "model")
    change(source / "config.json", auto_map={"AutoConfig": "keys"})
    with pytest.raises(UsageError, match=r'"MODULE.CLASS", got .keys'):
        choose(source)
