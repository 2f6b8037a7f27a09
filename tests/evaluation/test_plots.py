"""Plots show the numbers that the library returns."""

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


def test_the_title_names_the_part_of_a_long_row_that_is_drawn():
    long = {column: list(values) * 108 for column, values in PACKED.items()}
    for arguments, part in (({}, "0 to 63"), ({"first": 1290}, "1290 to 1295")):
        axes = plots.packed_row(long, **arguments)
        assert axes.get_title(loc="left") == f"tokens {part} of 0 to 1295"
        assert axes.figure.get_size_inches()[0] * 100 < 4000, "within the pixels that a viewer can show"
        first = arguments.get("first", 0)
        shown = axes.texts[: -len(plots.SHOWN) : len(plots.SHOWN)]
        assert [text.get_text() for text in shown] == list(map(str, long["input_ids"][first : first + 64]))
    assert plots.packed_row(PACKED).get_title(loc="left") == "", "the whole row is drawn"
    with pytest.raises(ValueError, match="tokens 0 to 11"):
        plots.packed_row(PACKED, first=12)


def test_no_legend_covers_a_bar():
    """This holds for any number of batch sizes and any length of the bars."""
    row = {"tokens_per_forward": 2.0, "slowest": 0.9, "speedup": 1.0, "fastest": 1.1}
    results = [row | {"batch_size": size, "decoding": name} for size in (1, 4, 16, 64) for name in map(str, range(8))]
    axes = plots.bench_bars({"results": results})
    axes.figure.canvas.draw()
    assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())


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
    assert committed <= painted <= committed + 1, "a text can end inside a draft"
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
    assert not seen[: sum(clean), sum(clean) :].any(), "clean tokens do not attend to noise"


def test_the_output_of_generate_is_drawn_row_by_row(output):
    first, second = (plots.trajectory(record, forwards=100) for record in output.trajectory)
    whole = plots.trajectory(output.trajectory, forwards=100)
    assert [patch.get_xy() for patch in whole.patches] == [patch.get_xy() for patch in first.patches]
    assert (whole.get_title(), first.get_title()) == ("text 0 of 0 to 1", "")
    first.set_title("a title of the caller's")
    assert plots.trajectory(output.trajectory[0], axes=first).get_title() == "a title of the caller's"
    other = plots.trajectory(output.trajectory, forwards=100, row=1)
    assert [patch.get_xy() for patch in other.patches] == [patch.get_xy() for patch in second.patches]
    for recorded, row, said in ((None, 0, "nothing was recorded"), (output.trajectory, 2, "there are 2 texts")):
        with pytest.raises(ValueError, match=said):
            plots.trajectory(recorded, row=row)
