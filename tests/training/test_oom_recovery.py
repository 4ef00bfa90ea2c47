"""Smaller micro-batches give the same loss. Whole runs that run out of memory are in tests/faults."""

from types import SimpleNamespace

import pytest
import torch

from rorchat.training.oom_recovery import OOMRecoveryMixin


@pytest.mark.parametrize("fits", [4, 2, 1])
def test_a_mean_loss_stays_the_same_however_often_memory_runs_out(fits, tmp_path):
    trainer = OOMRecoveryMixin.__new__(OOMRecoveryMixin)
    vars(trainer).update(
        args=SimpleNamespace(per_device_train_batch_size=4, world_size=1),
        state=SimpleNamespace(global_step=0),
        model=torch.nn.Linear(1, 1),
        micro_batch_rows=4,
        current_gradient_accumulation_steps=2,
        _micro_batch_file=tmp_path / "micro_batch.json",
        _micro_batches=[],
        _position=0,
    )

    def compute_mean(batch):
        if len(batch["x"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch["x"].mean() / trainer.current_gradient_accumulation_steps

    loss = trainer.retry_on_oom(compute_mean, {"x": torch.tensor([1.0, 2.0, 3.0, 6.0])})
    assert loss.item() == pytest.approx(3.0 / 2)
    assert (trainer.micro_batch_rows, trainer.current_gradient_accumulation_steps) == (fits, 2)
