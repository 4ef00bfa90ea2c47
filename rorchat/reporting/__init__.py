"""Reports of runs: report.md and curves.png, for one run or for all runs of a story (a folder of runs).

runs.py      the runs in a folder, their records and metrics
losses.py    which sources the losses of a run cover
curves.py    curves.png
tables.py    the tables, as Markdown
write.py     report.md
"""
