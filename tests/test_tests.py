"""Tests mirror the package, and no test file imports another one."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import rorchat

TESTS = Path(__file__).parent
PACKAGE = Path(rorchat.__file__).parent

#: Modules without tests/<path>/test_<module>.py, as patterns, and the file that tests them instead: because they are
#: small parts of one interface (sources, readers, commands), or because only whole runs can test them (tests/faults).
TESTED_IN = {
    "__init__.py": "test_layout.py",
    "*/__init__.py": "test_layout.py",
    "cli/*.py": "cli/test_cli.py",
    "evaluation/base_text.py": "training/test_base_loss.py",
    "evaluation/evaluate_metrics/*.py": "evaluation/test_evaluate_metrics.py",
    "inspection/guess.py": "test_inspection_formats.py",
    "inference/terminal.py": "recipes/test_recipes.py",
    "mixture/phases.py": "mixture/test_plan.py",
    "mixture/plot.py": "mixture/test_plan.py",
    "plan/*.py": "plan/test_budget.py",
    "project/files.py": "project/test_settings.py",
    "project/timing.py": "project/test_create.py",
    "reading/*.py": "reading/test_formats.py",
    "recipes/*.py": "recipes/test_recipes.py",
    "reporting/*.py": "test_reporting.py",
    "sources/*.py": "sources/test_registry.py",
    "tokenizer/training_text.py": "tokenizer/test_tokenizer.py",
    "tokens/evaluation_sets.py": "tokens/test_decontamination.py",
    "tokens/import_shards.py": "mixture/test_stores.py",
    "tokens/merge_shards.py": "tokens/test_tokenize_shard.py",
    "tokens/store_writer.py": "tokens/test_prepare.py",
    "tokens/workers.py": "tokens/test_tokenize_shard.py",
    "training/arguments.py": "training/test_pretrain.py",
    "training/callbacks/divergence.py": "faults/test_divergence.py",
    "training/callbacks/samples.py": "training/callbacks/test_run_output.py",
    "training/callbacks/signals.py": "faults/test_signals.py",
    "training/chat_stage.py": "training/test_sft.py",
    "training/checkpointing/fingerprint.py": "faults/test_refusals.py",
    "training/checkpointing/mirror.py": "faults/test_mirror.py",
    "training/checkpointing/trainer_mixin.py": "faults/test_resume.py",
    "training/result.py": "api/test_training.py",
    "training/context.py": "training/test_pretrain.py",
    "training/data.py": "training/test_sft.py",
    "training/distributed.py": "recipes/test_accelerate.py",
    "training/help.py": "cli/test_launch.py",
    "training/kernels/sliced_head.py": "training/kernels/test_lm_head_loss.py",
    "training/dpo_losses.py": "training/test_dpo.py",
    "training/readiness.py": "training/test_grpo.py",
    "training/trackers.py": "training/callbacks/test_run_output.py",
    "training/reference_logps.py": "training/test_dpo.py",
    "training/run_folder.py": "faults/test_refusals.py",
    "training/train_and_save.py": "faults/test_refusals.py",
    "training/checkpointing/recovery.py": "faults/test_crash_points.py",
    "validation_split.py": "sources/test_base.py",
    "training/sampler.py": "training/test_pretrain.py",
    "training/tokenizer.py": "recipes/test_recipes.py",
    "training/stage.py": "training/callbacks/test_run_output.py",
}


def imported_names(path: Path) -> set[str]:
    """The parts of the names of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {part for name in names for part in name.split(".")}


def test_no_test_file_imports_another():
    files = sorted(TESTS.rglob("*.py"))
    test_files = {path.stem for path in files if path.stem.startswith("test_")}
    assert len(test_files) > 40
    imported = {str(path.relative_to(TESTS)): test_files & imported_names(path) for path in files}
    assert {path: names for path, names in imported.items() if names} == {}


def test_every_module_is_tested_at_its_path_or_in_a_named_file():
    modules = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    missing = []
    for module in modules:
        path = Path(module)
        is_at_path = (TESTS / path.parent / f"test_{path.name}").is_file()
        if not is_at_path and not any(fnmatch(module, pattern) for pattern in TESTED_IN):
            missing.append(module)
    assert missing == []
    for pattern, test_file in TESTED_IN.items():
        assert any(fnmatch(module, pattern) for module in modules), f"{pattern} names no module"
        assert (TESTS / test_file).is_file(), test_file
