"""Evaluation: loss and bits per byte, questions with known answers, chat behaviour, and `evaluate` metrics."""
