"""A YAML file that somebody wrote -> its values. What cannot be meant is one line that says where it stands."""

from pathlib import Path

import yaml
from yaml.constructor import ConstructorError

from rorchat.errors import DataError, RorchatError

_MERGE = "tag:yaml.org,2002:merge"  # `<<: *other`, which is no key


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two values with one key without a word, and raises ValueError for a date of no year."""

    def construct_mapping(self, node, deep=False):
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        seen = []
        for key in (key for key, _ in pairs if key.tag != _MERGE):
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise ConstructorError(None, None, f"the key {name!r} stands twice: leave one out", key.start_mark)
            seen.append(name)
        return super().construct_mapping(node, deep)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{node.value!r} cannot be read ({error}): write it in quotes"
            raise ConstructorError(None, None, reason, node.start_mark) from None


def read_yaml(
    path: str | Path, what: str, error: type[RorchatError] = DataError, like: Path | None = None
) -> dict[object, object]:
    """The `key: value` lines of a YAML file.

    Args:
        what: what the file is, for the message: "persona", "config".
        error: the class of what is raised.
        like: a file of this kind that may be copied, for the message.

    Raises:
        error: the file cannot be read, is no YAML, has a key twice or a value that is none, or holds something else.
    """
    advice = f" Copy {like} and change it." if like else ""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"Cannot read the {what} {path}: {reason}.{advice}") from None
    except ConstructorError as problem:
        raise error(f"{path}:{problem.problem_mark.line + 1}: {problem.problem}.") from None
    except yaml.MarkedYAMLError as problem:
        said = ", ".join(part for part in (problem.context, problem.problem) if part)
        raise error(f"{path}:{problem.problem_mark.line + 1} is not YAML: {said}.") from None
    except yaml.YAMLError as problem:
        raise error(f"{path} is not YAML: {' '.join(str(problem).split())}.") from None
    if not isinstance(values, dict):
        held = "nothing" if values is None else f"a {type(values).__name__}"
        raise error(f"{path} is no {what}: it must hold `key: value` lines, it holds {held}.{advice}")
    return values
