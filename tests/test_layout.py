"""The package's listing follows the data, its imports have no circles, and importing it is cheap."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rorchat

PACKAGE = Path(rorchat.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in MODULES}


def stage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements below a node, those in functions too, without those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        if not is_type_checking(child):
            yield from walk_imports(child)


def imported_names(path: Path) -> Iterator[tuple[str, str, int]]:
    """(module of this package, name imported from it or "", line) of every import of a file."""
    for node in walk_imports(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        else:
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            names = [(f"{node.module}", alias.name) for alias in node.names]
        for module, name in names:
            if f"{module}.{name}" in NAMES:
                module, name = f"{module}.{name}", ""
            if module.split(".")[0] == "rorchat":
                yield module, name, node.lineno


def test_every_stage_has_a_module_and_every_module_a_stage():
    stages = {stage_of(path) for path in MODULES} - {"__init__"}
    assert stages == set(rorchat.STAGES)
    for stage in rorchat.STAGES:
        assert (PACKAGE / f"{stage}.py").is_file() != (PACKAGE / stage / "__init__.py").is_file(), stage


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in MODULES}
    assert len(folders) > 10
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("stage", rorchat.STAGES)
def test_a_module_imports_only_from_its_own_and_earlier_stages(stage):
    allowed = set(rorchat.STAGES[: rorchat.STAGES.index(stage) + 1])
    later = [
        f"{path.relative_to(PACKAGE)}:{line} imports {module}"
        for path in MODULES
        if stage_of(path) == stage
        for module, _, line in imported_names(path)
        if module != "rorchat" and module.split(".")[1] not in allowed
    ]
    assert later == []


@pytest.mark.parametrize("folder", ["rorchat", "tests", "scripts"])
def test_no_module_imports_a_private_name_of_another(folder):
    paths = MODULES if folder == "rorchat" else sorted((PACKAGE.parent / folder).rglob("*.py"))
    assert paths
    private = [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {module}.{name}"
        for path in paths
        for module, name, line in imported_names(path)
        for part in (*module.split("."), name)
        if part.startswith("_") and not part.startswith("__")
    ]
    assert private == []


def calls_without_encoding(path: Path) -> Iterator[str]:
    """Calls that read or write text in the encoding of the locale. Ruff's PLW1514 finds those on plain names only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = ast.unparse(node.func)
        is_binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in node.args)
        is_binary |= name == "os.open" or name.endswith("zip_file.open")  # files of an archive are read as bytes
        opens_text = name.endswith(".open") and not is_binary
        if opens_text or name.endswith((".read_text", ".write_text")):
            yield f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {name}"


def test_text_files_are_utf8_in_every_locale():
    root = PACKAGE.parent
    helpers = [path for path in (root / "tests").rglob("*.py") if not path.name.startswith("test_")]
    paths = [*MODULES, *(root / "scripts").rglob("*.py"), *helpers]
    assert len(helpers) > 10
    assert [call for path in paths for call in calls_without_encoding(path)] == []


def test_json_is_written_by_the_function_that_knows_no_nan():
    writers = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump")
    ]
    hashed = "sources/registry.py"  # not written
    assert [place.partition(":")[0] for place in writers if not place.startswith(hashed)] == ["files.py"]


def test_what_scripts_import_exists():
    imported = {
        (module, name)
        for path in (PACKAGE.parent / "scripts").rglob("*.py")
        for module, name, _ in imported_names(path)
        if module != "rorchat"
    }
    assert len(imported) > 40
    missing = [
        (module, name)
        for module, name in sorted(imported)
        if module not in NAMES or (name and not hasattr(importlib.import_module(module), name))
    ]
    assert missing == []


def test_no_files_import_each_other_in_a_circle():
    """A package counts as the file `__init__.py`; importing one of its modules imports it as well."""
    graph = {name: set() for name in NAMES}
    for name, path in NAMES.items():
        graph[name] = {module for module, _, _ in imported_names(path)} - {name, "rorchat"}
        assert graph[name] <= NAMES.keys(), graph[name] - NAMES.keys()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for module in graph[name]:
                visit(module, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_package_holds_the_files_that_are_not_modules():
    assert (PACKAGE / "py.typed").is_file()
    for pattern, least in (("*.yaml", 3), ("recipes/*/*.yaml", 20), ("recipes/*/run.sh", 7), ("recipes/help/*.txt", 5)):
        assert len(list(PACKAGE.glob(pattern))) >= least, pattern


@pytest.mark.parametrize(
    "arguments",
    [["import", "rorchat"], ["rorchat.sft"], ["rorchat", "--help"], ["rorchat", "sft", "--help"]],
    ids=" ".join,
)
def test_import_and_help_need_no_torch_and_half_a_second(arguments):
    code = "import sys, rorchat"
    if arguments == ["rorchat.sft"]:
        code += "; import pydoc; assert 'lora_rank INT' in pydoc.plain(pydoc.render_doc(rorchat.sft))"
    if arguments[0] == "rorchat":
        code += f", rorchat.cli; sys.argv = {arguments}\ntry: rorchat.cli.main()\nexcept SystemExit: pass"
    code += "\nimport resource; used = resource.getrusage(resource.RUSAGE_SELF)\n"
    code += "print('MEASURED', 'torch' in sys.modules, used.ru_utime + used.ru_stime)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    loaded, seconds = process.stdout.split("MEASURED ")[1].split()
    assert loaded == "False"
    assert float(seconds) < 0.5


def test_no_public_name_is_also_a_module():
    """Importing a module sets it as an attribute of the package, in place of a function of the same name."""
    assert {name.partition(".")[2] for name in NAMES if name.count(".") == 1} & set(rorchat.__all__) == set()


def test_type_checkers_see_the_public_names():
    (block,) = (node for node in ast.parse(NAMES["rorchat"].read_text()).body if is_type_checking(node))
    imported = {alias.name for node in block.body for alias in node.names}
    assert imported == set(rorchat.__all__) - {"STAGES", "__version__"}


def test_help_lists_the_functions_in_the_order_of_the_work():
    assert rorchat.__doc__ is not None
    listed = re.findall(r"^    rorchat\.(\w+)  ", rorchat.__doc__, re.MULTILINE)
    functions = [name for name in rorchat.__all__ if inspect.isfunction(getattr(rorchat, name))]
    assert listed == [name for name in functions if getattr(rorchat, name).__module__.startswith("rorchat.api.")]
    assert {*listed, *rorchat.__all__} == set(dir(rorchat))


def test_public_names_exist_and_an_unknown_one_lists_them():
    for name in rorchat.__all__:
        assert getattr(rorchat, name) is not None
    with pytest.raises(AttributeError, match="load_model"):
        rorchat.load_modell  # noqa: B018
