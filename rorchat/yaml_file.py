"""Reads YAML files that users write. Errors name the line."""

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from rorchat.errors import DataError, RorchatError

_MERGE = "tag:yaml.org,2002:merge"  # `<<: *other`


class _Loader(yaml.SafeLoader):
    """Reports duplicate keys, which PyYAML ignores, and invalid values, for which PyYAML raises a plain ValueError."""

    def construct_mapping(self, node, deep=False):
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        names = []
        for key in (key for key, _ in pairs if key.tag != _MERGE):
            name = self.construct_object(key, deep=True)
            if name in names:
                raise ConstructorError(None, None, f"duplicate key {name!r}: remove one", key.start_mark)
            names.append(name)
        return super().construct_mapping(node, deep)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{node.value!r} is not a valid value ({error}): put it in quotes"
            raise ConstructorError(None, None, reason, node.start_mark) from None


def _get_line(error: yaml.MarkedYAMLError) -> int:
    return error.problem_mark.line + 1 if error.problem_mark else 1


def read_yaml(
    path: str | Path, what: str, error: type[RorchatError] = DataError, example: Path | None = None
) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Args:
        what: the kind of file for error messages, such as "config".
        error: class of the errors.
        example: a file that the error message suggests to copy.

    Raises:
        error: the file cannot be read, is not YAML, has a duplicate key or an invalid value, or is not a mapping.
    """
    advice = f" Copy {example} and change it." if example else ""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise error(f"Cannot read the {what} {path}: {reason}.{advice}") from None
    except ConstructorError as problem:
        raise error(f"{path}:{_get_line(problem)}: {problem.problem}.") from None
    except yaml.MarkedYAMLError as problem:
        reason = ", ".join(part for part in (problem.context, problem.problem) if part)
        raise error(f"{path}:{_get_line(problem)} is not YAML: {reason}.") from None
    except yaml.YAMLError as problem:
        raise error(f"{path} is not YAML: {' '.join(str(problem).split())}.") from None
    if not isinstance(values, dict):
        content = "nothing" if values is None else f"a {type(values).__name__}"
        raise error(f"{path} is not a {what}: it must contain `key: value` lines, but contains {content}.{advice}")
    return values
