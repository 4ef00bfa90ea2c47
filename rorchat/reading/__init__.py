"""Reads raw rows from files: text, JSON, CSV and Parquet, compressed or not.

`formats.read_rows` yields the rows of one file. Unlike `datasets.load_dataset`, it does not stop at the first bad row
and copies nothing into a cache: a bad row is yielded as a `RejectedRow`, and every row comes with its file and line.
"""
