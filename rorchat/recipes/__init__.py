"""The training commands, one module each, and the stories: folders of YAML files with a script.

In Python, `main` takes the flags as a list, returns the metrics, and raises `RorchatError` where the command would
print one line and exit:

    from rorchat.recipes import sft
    metrics = sft.main(["--config", "demo/sft.yaml", "--max_steps", "20"])
"""
