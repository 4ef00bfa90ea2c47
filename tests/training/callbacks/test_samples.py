"""Samples during training."""

import torch
from callback_support import ARGUMENTS, make_state, start_metrics

from rorchat.training.callbacks.samples import SamplesCallback
from rorchat.training.callbacks.signals import SignalCallback


def test_samples_are_generated_in_eval_mode(tmp_path):
    model, seen = torch.nn.Dropout(0.5).train(), []
    samples = SamplesCallback(
        tmp_path,
        ["Hi"],
        lambda prompts: seen.append(model.training) or ["x"],
        start_metrics(tmp_path),
        SignalCallback(tmp_path),
    )
    samples.on_step_end(ARGUMENTS, make_state(20), None, model=model)
    samples.on_step_end(ARGUMENTS, make_state(21), None, model=model)
    samples.on_step_end(ARGUMENTS, make_state(40), None, model=model)  # on_train_end takes the last one
    assert seen == [False] and model.training
