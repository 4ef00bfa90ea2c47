"""SCORES: loss and bits per byte, held-out questions, and how a chat model behaves."""
