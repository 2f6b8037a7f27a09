"""The example of packing that docs/training.md works by hand."""

# Two prompt tokens, blocks of two tokens, the last one short.
ROW = {
    "prompt_ids": [1, 2],
    "completion_ids": [11, 12, 13, 14, 15],
    "block_size": 2,
    "trajectories": [[[11, 90], [11, 12]], [[13, 91], [13, 14]], [[92], [15]]],
}
# window_size=2, linear: levels 0 and 1 over each window, so block 0 is clean, block 1 noisy, block 2 clean.
PACKED = {
    "input_ids": [1, 2, 11, 12, 13, 14, 15, 11, 12, 13, 91, 15],
    "position_ids": [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6],
    "block_ids": [-1, -1, -1, -1, -1, -1, -1, 0, 0, 1, 1, 2],
    "window_start": [0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 6],
    "labels": [-100, -100, 11, 12, 13, 14, 15, -100, -100, -100, -100, -100],
    "seq_ids": [0] * 12,
    "twin_ids": [-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 5, -1],
}
