"""RAW DATA: one file = one dataset; the file's name is the dataset's name in a recipe.

A source module holds, as data and one pure function:

    KIND      "document", "conversation" or "preference"
    LICENCE   as its publisher states it, with "(not for commercial use)" or "unstated" where that is so
    SIZE      how much there is of it, as published
    HUB       arguments of `datasets.load_dataset` (Parquet or plain files), or None
    FILES     glob patterns of its files in a local folder, best first; compressed ones (.gz, .zst) are found as well
    RAW       some raw rows: they document the format, and are its test
    convert   raw row -> a row of its kind (`Repaired` where it had to be mended), or `Reject`
    to_question  optional: raw row -> a question whose answer can be verified; the source then gives questions as well
    read      optional: (place, raw row) of one of FILES, where the original files are of no common format
    gather    optional: (place, raw row)s -> (place, raw row)s, where several rows make one raw row, from file to file
    RESTARTS_PER_FILE  optional, with `gather`: True where it begins anew with every file, so that files may be read
              apart, by several processes
    BESIDE    optional, with `read`: glob patterns of files beside those of FILES from which `read` takes something

Generated sources (tinytown, persona) have `generate(kind, amount, seed, persona)` instead; ABOUT_PERSONA where the
persona has a say in what they give. To add a dataset, see
docs/add_a_dataset.md.

`chat:NAME` is a source's conversations where it has documents too, as in `chat:tinytown=5000`.
"""
