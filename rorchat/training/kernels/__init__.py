"""Numerics of the training step: attention, loss, log-probabilities and recomputation."""
