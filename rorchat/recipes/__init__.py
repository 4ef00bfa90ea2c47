"""The training commands, one module each, and the YAML files of the stories."""
