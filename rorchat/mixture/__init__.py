"""Mixes token stores by tokens and turns them into training rows and batches."""
