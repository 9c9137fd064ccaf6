"""The wheel works away from its checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", str(CHECKOUT), "--no-deps", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_configuration_published_numbers_and_embedded_model_inside_the_package(unpacked: Path) -> None:
    assert names(unpacked / "horen_bench" / "conf") == names(CHECKOUT / "conf")
    assert names(unpacked / "horen_bench" / "baselines" / "paper") == names(CHECKOUT / "baselines" / "paper")
    data = names(unpacked / "horen_bench" / "data")
    assert {"tiny/model.safetensors", "tiny/tokenizer.json", "tiny/config.json"} <= data
    for name in sorted(data):
        assert (unpacked / "horen_bench" / "data" / name).read_bytes() == (CHECKOUT / "data" / name).read_bytes()


def test_the_wheel_holds_every_module_and_nothing_of_the_checkout_beside_it(unpacked: Path) -> None:
    modules = {name for name in names(CHECKOUT / "src" / "horen_bench") if name.endswith(".py")}
    assert modules == {name for name in names(unpacked / "horen_bench") if name.endswith(".py")}
    beside = {path.name for path in unpacked.iterdir()}
    assert {name.split("-")[0] for name in beside} == {"horen_bench"}


def test_the_unpacked_wheel_finds_its_own_files_and_runs(unpacked: Path, tmp_path: Path) -> None:
    """Without the checkout: the package is taken from the wheel, and so are its configuration and model."""
    script = (
        "import sys, horen_bench.paths as r; print(r.__file__); print(r.resource('conf')); "
        "print(r.resource('data')); from horen_bench.__main__ import main; "
        "sys.argv[1:] = ['n=2', 'checkpoints=[]', 'method.n_steps=2', 'results_dir=out']; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    package = unpacked / "horen_bench"
    assert done.stdout.splitlines()[:3] == [str(package / name) for name in ("paths.py", "conf", "data")]
    assert list(tmp_path.glob("out/runs/tiny-horen-facts-*/checkpoints.csv"))
