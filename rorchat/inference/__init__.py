"""Inference: load a model, generate, stream, chat in the terminal."""
