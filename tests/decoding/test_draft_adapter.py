"""A draft-only adapter changes the drafts, never the text."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import padded_prompts, tiny_model, tokens_per_forward, trained_model

import hf_jacobi
from hf_jacobi.decoding import draft_adapter
from hf_jacobi.decoding.draft_adapter import DRAFT_ONLY, DraftAdapter


peft = pytest.importorskip("peft")


def with_adapter(name="llama", seed=3, scale=0.5, rank=4, base=tiny_model):
    """A tiny model with a draft-only adapter of random weights, so that its drafts differ from the base model's."""
    # The input of experts does not separate rows.
    targets = ["q_proj", "v_proj", "o_proj"] if name == "llama4" else "all-linear"
    config = peft.LoraConfig(
        r=rank, target_modules=targets, alora_invocation_tokens=list(DRAFT_ONLY), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base(name), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data.normal_(std=scale, generator=generator)
    return hf_jacobi.enable(model)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-window", "llama4"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_size": 8},
        {"block_size": 8, "window": "block", "draft_init": "prompt", "pool_size": 0},
        {"block_size": 6, "max_blocks": 3, "spawn_ratio": 0.5},
    ],
)
def test_text_is_the_base_models(name, rows, settings):
    """With an adapter that is nearly always wrong, and with one that is correct often enough to be accepted."""
    prompts = padded_prompts(rows)
    call = {"max_new_tokens": 40, "do_sample": False}
    jacobi = {"decoding": "jacobi", "jacobi_config": settings, "return_dict_in_generate": True}
    accepted = []
    for base, scale in ((tiny_model, 0.5), (trained_model, 0.05)):
        expected = base(name).generate(**prompts, **call)
        model = with_adapter(name, base=base, scale=scale)
        assert torch.equal(model.generate(**prompts, **call, decoding="ar"), expected)
        out = model.generate(**prompts, **call, **jacobi)
        assert torch.equal(out.sequences, expected)
        accepted.append(tokens_per_forward(out))
    assert accepted[1] > 1.2 or not settings, f"{accepted} tokens per forward"


def test_sampled_text_is_the_base_models():
    prompts = padded_prompts(3)
    base = hf_jacobi.enable(tiny_model())
    config = hf_jacobi.JacobiConfig(block_size=8, seed=4)
    settings = {"decoding": "jacobi", "jacobi_config": config, "do_sample": True, "max_new_tokens": 30}
    assert torch.equal(with_adapter().generate(**prompts, **settings), base.generate(**prompts, **settings))


def test_drafts_are_the_adapters_predictions():
    """Compared with PEFT's own forward: the adapter is on for the draft and off for the text before it."""
    model = with_adapter()
    prompt = padded_prompts(1)["input_ids"]
    config = hf_jacobi.JacobiConfig(block_size=6, pool_size=0, draft_init="repeat")
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), decoding="jacobi", jacobi_config=config, do_sample=False,
        max_new_tokens=30, return_dict_in_generate=True, output_trajectory=True,
    )  # fmt: skip
    text = output.sequences[0].tolist()
    compared = 0
    steps = output.trajectory[0].steps[1:]
    for step, following in itertools.pairwise(steps):
        row = torch.tensor([text[: step.start] + step.draft])
        with torch.no_grad():
            logits = model(row, alora_offsets=[len(step.draft)]).logits[0, step.start :]
        drafted = logits.argmax(-1).tolist()[len(step.accepted) :]
        common = min(len(drafted), len(following.draft) - 1)
        assert following.draft[1 : 1 + common] == drafted[:common]
        compared += common
    assert compared > 20


def test_only_drafts_pay_for_it():
    prompts = padded_prompts(1)
    config = hf_jacobi.JacobiConfig(block_size=4, pool_size=0)
    settings = {"decoding": "jacobi", "jacobi_config": config, "max_new_tokens": 20, "return_dict_in_generate": True}
    positions = [
        model.generate(**prompts, do_sample=False, **settings).jacobi_stats
        for model in (with_adapter(), hf_jacobi.enable(tiny_model()))
    ]
    assert positions[0].positions > positions[1].positions


def test_an_adapter_switched_off_drafts_nothing():
    model = with_adapter()
    assert DraftAdapter.of(model.get_base_model()) is not None
    with model.disable_adapter():
        assert DraftAdapter.of(model.get_base_model()) is None
    assert DraftAdapter.of(tiny_model()) is None


def test_copies_stay_within_the_position_table():
    """Rows of a batch have drafts of different lengths near the end of the table of positions."""
    sizes = {"n_positions": 64, "max_position_embeddings": 64}
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", alora_invocation_tokens=list(DRAFT_ONLY), task_type="CAUSAL_LM"
    )
    model = hf_jacobi.enable(peft.get_peft_model(tiny_model("gpt2", **sizes), config).eval())
    prompts = padded_prompts(3)
    settings = hf_jacobi.JacobiConfig(block_size=16)
    ours = model.generate(**prompts, decoding="jacobi", jacobi_config=settings, max_length=64, do_sample=False)
    assert torch.equal(ours, tiny_model("gpt2", **sizes).generate(**prompts, max_length=64, do_sample=False))


def test_it_survives_saving(tmp_path):
    model = with_adapter()
    tiny_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = hf_jacobi.enable(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    prompts = padded_prompts(2)
    settings = {"decoding": "jacobi", "max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    ours, theirs = model.generate(**prompts, **settings), loaded.generate(**prompts, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.jacobi_stats.to_dict() == theirs.jacobi_stats.to_dict()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_quick_way_through_a_layer_drafts_as_peft_does(monkeypatch, name, rank, rows):
    """Without recycling, a large adapter and the base model compute one product together."""
    model = with_adapter(name, rank=rank, scale=0.5 * 2 / rank**0.5)
    inputs = padded_prompts(rows)
    products = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *factors: products.append(None) or bmm(*factors))
    arguments = {"jacobi_config": {"block_size": 6, "pool_size": 0}, "max_new_tokens": 24, "output_trajectory": True}

    def drafts() -> list:
        output = model.generate(**inputs, decoding="jacobi", return_dict_in_generate=True, **arguments)
        return [[step.draft for step in trajectory.steps] for trajectory in output.trajectory]

    quick = drafts()
    kinds = {type(module) for module in model.modules()} | {type(module) for module in with_adapter(name).modules()}
    assert len(kinds) == len({type(module) for module in with_adapter(name).modules()}), "layers keep their class"
    assert bool(products) == (rank == 16 and name != "gpt2"), "gpt2's layers are not `Linear`"
    monkeypatch.setattr(draft_adapter, "_has_nothing_else", lambda layer: False)
    assert drafts() == quick


def test_weights_that_change_are_taken_up_by_the_next_drafts():
    prompts = padded_prompts(1)
    settings = {"decoding": "jacobi", "jacobi_config": {"block_size": 6, "pool_size": 0}, "max_new_tokens": 24}
    settings |= {"return_dict_in_generate": True, "output_trajectory": True}
    model = with_adapter(rank=16, scale=0.0)

    def drafts() -> list:
        return [step.draft for step in model.generate(**prompts, **settings).trajectory[0].steps]

    before = drafts()
    other = with_adapter(rank=16).state_dict()
    model.load_state_dict(other)
    changed = drafts()
    assert changed != before
    model = with_adapter(rank=16)
    assert changed == drafts()


def test_base_weights_that_change_are_taken_up_by_the_next_text():
    """Through `.data`, as PEFT merges adapters, which does not change the version of a parameter."""
    prompts = padded_prompts(1)
    settings = {"jacobi_config": {"block_size": 6, "pool_size": 0}, "max_new_tokens": 24, "do_sample": False}
    model = with_adapter(rank=16)
    before = model.generate(**prompts, decoding="jacobi", **settings)
    layer = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    layer.weight.data += torch.ones_like(layer.weight)
    after = model.generate(**prompts, decoding="jacobi", **settings)
    assert not torch.equal(after, before)
    assert torch.equal(after, model.generate(**prompts, decoding="ar", max_new_tokens=24, do_sample=False))


def test_threads_share_an_adapter():
    model = with_adapter()
    prompts = padded_prompts(1)
    expected = tiny_model().generate(**prompts, max_new_tokens=30, do_sample=False)

    def texts(block_size: int) -> list:
        config = {"block_size": block_size}
        return [
            model.generate(**prompts, max_new_tokens=30, do_sample=False, decoding="jacobi", jacobi_config=config)
            for _ in range(4)
        ]

    with ThreadPoolExecutor(2) as pool:
        found = itertools.chain.from_iterable(pool.map(texts, (3, 12)))
    assert all(torch.equal(text, expected) for text in found)


def test_a_forward_that_was_put_on_a_layer_is_still_there_afterwards():
    model = with_adapter()
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    mine = layer.forward
    model.generate(**padded_prompts(1), max_new_tokens=4, decoding="jacobi")
    assert layer.forward is mine


DEAR = [[1, 1.0], [2, 1.9], [4, 3.7], [16, 14.0]]  # a cost of positions at which long drafts do not pay


@pytest.mark.parametrize("rows", [1, 3])
def test_an_adapter_that_does_not_pay_takes_no_part(monkeypatch, rows):
    """With random weights, and a base model that predicts itself well, most forwards use the base model alone."""
    model = with_adapter(base=trained_model, scale=0.5)
    prompts, served = padded_prompts(rows), []
    on = DraftAdapter.on
    monkeypatch.setattr(DraftAdapter, "on", lambda self, tokens: served.append(tokens) or on(self, tokens))
    call = {"max_new_tokens": 160, "do_sample": False, "decoding": "jacobi", "return_dict_in_generate": True}
    out = model.generate(**prompts, **call, jacobi_config={"position_cost": 0.05})
    assert torch.equal(out.sequences, trained_model().generate(**prompts, max_new_tokens=160, do_sample=False))
    assert tokens_per_forward(out) > 1.3, "the model's own predictions are tried"
    assert sum(tokens > 0 for tokens in served) < len(served) / 3, f"the adapter took part in {served}"
    served.clear()
    model.generate(**prompts, **call, jacobi_config={"position_cost": DEAR})
    assert sum(tokens > 0 for tokens in served) < len(served) / 20


def test_an_adapter_that_pays_takes_part(monkeypatch):
    """The adapter's weights are zero, so that it is correct whenever the model is; its positions are made free."""
    model = with_adapter(base=trained_model, scale=0.0)
    served = []
    on = DraftAdapter.on
    monkeypatch.setattr(DraftAdapter, "on", lambda self, tokens: served.append(tokens) or on(self, tokens))
    prompts = padded_prompts(1)
    call = {"max_new_tokens": 160, "do_sample": False, "decoding": "jacobi", "return_dict_in_generate": True}
    out = model.generate(
        **prompts, **call, jacobi_config={"position_cost": 0.0001, "draft_init": "repeat", "pool_size": 0}
    )
    assert torch.equal(out.sequences, trained_model().generate(**prompts, max_new_tokens=160, do_sample=False))
    assert tokens_per_forward(out) > 1.3 and any(served)


@pytest.mark.parametrize("tokens", [0, 2])
def test_hooks_of_a_layer_below_the_adapter_are_called(tokens):
    model = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=4, target_modules=["o_proj"], alora_invocation_tokens=[-1])
    )
    model.eval()
    adapter = DraftAdapter.of(model)
    base, seen = adapter.layers[0].base_layer, []
    base.register_forward_hook(lambda *call: seen.append(1))
    with torch.no_grad(), adapter.listening(), adapter.on(tokens):
        model(torch.tensor([[3, 4, 5, 6]]))
    assert seen


def test_a_layer_whose_adapter_is_off_runs_what_is_below_and_nothing_else(monkeypatch):
    model = with_adapter()
    adapter, ids = DraftAdapter.of(model), torch.tensor([[3, 4, 5, 6]])
    calls = []
    monkeypatch.setattr(
        draft_adapter._listening_class(type(adapter.layers[0])), "forward", lambda *call: calls.append(1) or 1 / 0
    )
    with torch.no_grad(), adapter.listening(), adapter.on(0):
        found = model.get_base_model()(ids).logits
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(found, model.get_base_model()(ids).logits) and not calls


def test_hooks_of_all_modules_are_called_for_layers_whose_adapter_is_off():
    model = with_adapter()
    adapter, seen = DraftAdapter.of(model), set()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *call: seen.add(module))
    try:
        with torch.no_grad(), adapter.listening(), adapter.on(0):
            model.get_base_model()(torch.tensor([[3, 4, 5, 6]]))
    finally:
        handle.remove()
    assert all({layer, layer.base_layer} <= seen for layer in adapter.layers)
