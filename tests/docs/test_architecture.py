"""docs/architecture.md lists exactly the modules that exist."""

import re

from support import ROOT

import rorchat

PACKAGE = ROOT / "rorchat"


def list_documented_modules() -> list[str]:
    """Backticked names in the section "Modules" that end with `.py` or `/`: first columns and the list of datasets."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("\n## Modules\n")[1].split("\n## ")[0]
    names: list[str] = []
    for line in section.splitlines():
        text = line.split("|")[1] if line.startswith("|") else line
        names += re.findall(r"`([\w/]+(?:\.py|/))`", text)
    return names


def list_modules() -> set[str]:
    """Paths of all modules below rorchat/; a package is its folder with a slash."""
    paths = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    return {path if "/" not in path else path.removesuffix("__init__.py") for path in paths}


def test_the_module_list_equals_the_tree():
    documented = list_documented_modules()
    assert len(documented) > 90
    assert sorted(set(documented)) == sorted(documented), "a module is listed twice"
    assert set(documented) - list_modules() == set(), "listed, but not in rorchat/"
    assert list_modules() - set(documented) == set(), "not listed in docs/architecture.md"


def test_modules_are_listed_in_the_order_of_the_stages():
    stages = [name.split("/")[0].removesuffix(".py") for name in list_documented_modules()]
    order = [stage for stage in dict.fromkeys(stages) if stage != "__init__"]
    assert order == list(rorchat.STAGES)


def test_every_exit_code_is_documented():
    from rorchat import errors

    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("\n## Exit codes\n")[1].split("\n## ")[0]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
    classes = [value for value in vars(errors).values() if isinstance(value, type) and hasattr(value, "exit_code")]
    assert documented == {0, *(error.exit_code for error in classes if error is not errors.RorchatError)}
