"""Reads YAML files written by users, and reports errors with their line number."""

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from rorchat.errors import DataError, RorchatError

_MERGE = "tag:yaml.org,2002:merge"  # `<<: *other`


class _Loader(yaml.SafeLoader):
    """A `SafeLoader` that reports the line of duplicate keys and of invalid values.

    PyYAML silently uses the last of several equal keys, and raises a `ValueError` without a line for an invalid value.
    """

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
    path: str | Path, what: str, error_class: type[RorchatError] = DataError, example: Path | None = None
) -> dict[Any, Any]:
    """Reads a YAML file that contains a mapping.

    Args:
        what: the kind of file, as named in error messages, such as "config".
        error_class: the exception to raise.
        example: a valid file; error messages suggest copying it.

    Raises:
        error_class: the file cannot be read, is not valid YAML, has a duplicate key or an invalid value, or does not
            contain a mapping.
    """
    advice = f" Copy {example} and change it." if example else ""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise error_class(f"Cannot read the {what} {path}: {reason}.{advice}") from None
    except ConstructorError as problem:
        raise error_class(f"{path}:{_get_line(problem)}: {problem.problem}.") from None
    except yaml.MarkedYAMLError as problem:
        reason = ", ".join(part for part in (problem.context, problem.problem) if part)
        raise error_class(f"{path}:{_get_line(problem)} is not YAML: {reason}.") from None
    except yaml.YAMLError as problem:
        raise error_class(f"{path} is not YAML: {' '.join(str(problem).split())}.") from None
    if not isinstance(values, dict):
        content = "nothing" if values is None else f"a {type(values).__name__}"
        raise error_class(
            f"{path} is not a {what}: it must contain `key: value` lines, but contains {content}.{advice}"
        )
    return values
