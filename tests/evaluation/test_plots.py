"""Pictures are drawn of what the library returns, and show its numbers."""

import matplotlib
import pytest
from matplotlib.colors import to_hex
from models import padded_prompts, tiny_model
from packing_example import PACKED


matplotlib.use("Agg")


import hf_jacobi
from hf_jacobi import plots
from hf_jacobi.trajectories import packing_statistics


def test_noise_levels():
    axes = plots.noise_levels(packing_statistics([PACKED]))
    assert [round(bar.get_height(), 3) for bar in axes.patches] == [0.667, 0, 0, 0, 0, 0.333, 0, 0, 0, 0, 0]
    assert "3 noisy blocks" in axes.get_title()


def test_a_packed_row_shows_every_entry():
    axes = plots.packed_row(PACKED)
    written = [text.get_text() for text in axes.texts]
    for column, values in PACKED.items():
        assert column in written
        for value in values:
            assert ("·" if value == -100 else str(value)) in written
    assert len(axes.patches) == 7 * 12


@pytest.fixture(scope="module")
def output():
    model = hf_jacobi.enable(tiny_model())
    config = {"block_size": 6, "pool_size": 4}
    arguments = {"decoding": "jacobi", "jacobi_config": config, "max_new_tokens": 40}
    prompts = padded_prompts(2)
    return model.generate(**prompts, **arguments, return_dict_in_generate=True, output_trajectory=True)


def test_a_trajectory_colours_what_was_committed(output):
    (record, *_), stats = output.trajectory, output.jacobi_stats.per_sequence[0]
    axes = plots.trajectory(record, forwards=100)
    colours = [to_hex(patch.get_facecolor()) for patch in axes.patches]
    steps = [step for step in record.steps if step.draft]
    committed = sum(min(len(step.accepted), len(step.draft)) - 1 for step in steps if step.accepted)
    painted = colours.count(plots.ACCEPTED) + colours.count(plots.RECYCLED)
    assert committed <= painted <= committed + 1, "a text may end inside a draft"
    assert (colours.count(plots.RECYCLED) > 0) == (stats.recycled_tokens > 0)
    assert plots.WRONG in colours
    assert len(plots.trajectory(record, forwards=3).patches) < len(axes.patches)


def test_accepted_tokens_and_training_curves(output):
    stats = output.jacobi_stats
    bars = plots.accepted_tokens(stats).patches
    assert [bar.get_height() for bar in bars] == stats.accepted_per_forward
    history = [{"step": 1, "ar_loss": 2.0}, {"step": 2, "ar_loss": 1.5}, {"step": 2, "eval_agreement": 0.5}]
    losses, agreement = plots.training_curves(history)
    assert list(losses.lines[0].get_ydata()) == [2.0, 1.5] and list(agreement.lines[0].get_ydata()) == [0.5]
    with pytest.raises(ValueError, match="was logged"):
        plots.training_curves([{"step": 1, "loss": 2.0}])


def test_the_mask_of_a_row():
    (image,) = plots.attention_mask(PACKED).images
    seen = image.get_array()
    assert seen.shape == (len(PACKED["input_ids"]),) * 2 and seen.diagonal().all()
    clean = [block < 0 for block in PACKED["block_ids"]]
    assert not seen[: sum(clean), sum(clean) :].any(), "text sees no noise"
