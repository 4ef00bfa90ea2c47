"""Datasets: one file each, whose name is the name of the dataset in recipes and commands.

A source module contains these constants and functions (`base.Source` collects them):

    KIND      "document", "conversation" or "preference", or a tuple of several
    LICENCE   as its publisher states it; append "(not for commercial use)" or begin with "unstated" if that applies
    SIZE      how many rows are published
    HUB       arguments of `datasets.load_dataset` (Parquet or plain files), or None
    FILES     glob patterns of its files in a local folder, best first; compressed files (.gz, .zst) match as well
    RAW       some raw rows, which document the format and serve as a test
    convert   raw row -> row of its kind, or `ConvertedRow`; raises `RejectedRow`
    to_question  optional: raw row -> question with a verifiable answer; adds the kind "question"
    read      optional: path -> (place, raw row)s, for files in no common format
    gather    optional: (place, raw row)s -> (place, raw row)s, if several rows make one or one makes several
    RESTARTS_PER_FILE  optional, with `gather`: True if no row continues in the next file, so files are read in parallel
    BESIDE    optional, with `read`: glob patterns of further files that `read` opens

Generated sources (tinytown, persona) have `generate(kind, amount, seed, persona)` instead of HUB, FILES, RAW and
`convert`,
and ABOUT_PERSONA = True if their rows depend on the persona. To add a dataset, see docs/add_a_dataset.md.
"""
