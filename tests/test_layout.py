"""The listing is the way of the data, and importing is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rorchat

PACKAGE = Path(rorchat.__file__).parent


def stage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_stages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    stages = {name.split(".")[1] for name in names if name.startswith("rorchat.")}
    return {stage for stage in stages if not stage.startswith("__")}


def test_every_module_has_a_stage_and_every_stage_a_module():
    found = {stage_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert found == set(rorchat.STAGES)


def test_a_module_imports_only_from_stages_before_its_own():
    paths = [path for path in PACKAGE.rglob("*.py") if stage_of(path) != "__init__"]
    assert len(paths) > 20
    for path in paths:
        own = rorchat.STAGES.index(stage_of(path))
        late = {stage for stage in imported_stages(path) if rorchat.STAGES.index(stage) > own}
        assert not late, f"{path.relative_to(PACKAGE)} imports {sorted(late)}, which come later in the way of the data"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import rorchat",
        "import sys, rorchat.cli; sys.argv = ['rorchat', '--help']\ntry: rorchat.cli.main()\nexcept SystemExit: pass",
    ],
    ids=["import", "help"],
)
def test_import_and_help_take_under_half_a_second_of_cpu_and_no_torch(code):
    measured = run(
        f"{code}\nimport resource, sys\nused = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('MEASURED', 'torch' in sys.modules, used.ru_utime + used.ru_stime)"
    )
    loaded, seconds = measured.split("MEASURED ")[1].split()
    assert loaded == "False"
    assert float(seconds) < 0.5


def test_every_public_name_can_be_had_and_an_unknown_one_says_what_there_is():
    for name in rorchat.__all__:
        assert getattr(rorchat, name) is not None
    with pytest.raises(AttributeError, match="load_model"):
        rorchat.load_modell  # noqa: B018
