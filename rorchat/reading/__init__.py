"""Reads raw rows from files: text, JSON, CSV and Parquet, compressed or not."""
