"""From a budget to a training run: model size, tokens, batches, memory, hours, money.

scaling.py   which model and how many tokens reach the lowest loss
cost.py      the seconds of a step, and its memory by part
budget.py    a request -> a plan, or an error that says what would fit
probe.py     measured instead of assumed speed
show.py      a plan as a table, as the YAML of a pretraining run, as a figure
"""
