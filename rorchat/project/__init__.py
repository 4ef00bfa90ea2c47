"""A project: a story made for one person's data, time and machine (`rorchat new`), and its run (`rorchat run`).

survey -> vocabulary -> timing -> sizing -> schedule -> files -> runner
"""
