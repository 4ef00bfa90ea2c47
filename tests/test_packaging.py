"""The wheel holds every file of the package, and nothing else."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from support import ROOT


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    for name in files:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*build, tmp_path / "tree"], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("rorchat-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {name for name in files if name.startswith("rorchat/")}
