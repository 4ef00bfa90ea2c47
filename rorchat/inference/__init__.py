"""WORDS: load a model, generate, stream, talk."""
