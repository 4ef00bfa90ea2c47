"""The training commands, one module each, and the stories: folders of YAML files with a script.

`main` takes the flags of the command line as a list and returns the metrics; `train` also takes settings as Python
values and returns a `TrainingResult`. Both raise `RorchatError` where the command would print one line and exit. In
Python, `rorchat.sft(...)` is more convenient (`rorchat.api`).
"""
