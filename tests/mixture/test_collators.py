"""Batches are padded on the right with ignored labels."""

import torch

from rorchat.mixture.collators import collate_padded


def test_batches_are_padded_on_the_right_with_ignored_labels():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": torch.tensor([4]), "labels": [4]}]
    batch = collate_padded(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
