"""The commands as Python functions, which return their results and raise exceptions. See docs/python.md."""
