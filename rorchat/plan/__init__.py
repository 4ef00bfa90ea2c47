"""A budget -> the model to train on it: shape, tokens, batches, memory, hours, money.

scaling.py   which model and how many tokens give the lowest loss
cost.py      what a step takes: seconds, and memory by part
budget.py    a request -> a plan, or what would fit instead
probe.py     measured seconds in place of assumed ones
show.py      a plan as a table, as the YAML of a pretraining run, as a picture
"""
