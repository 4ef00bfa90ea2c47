"""Saves, verifies, mirrors and resumes checkpoints."""
