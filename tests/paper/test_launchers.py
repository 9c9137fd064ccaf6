"""Launchers of Hydra run the same grids."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from horen_bench.paths import resource

QUICK = ["n=4", "checkpoints=[2]", "protocol=greedy", "method.n_steps=2", "device=cpu"]


@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.submitit_folder=jobs"],
    ],
    ids=["joblib", "submitit"],
)
def test_launchers_run_the_members_of_a_sweep_and_bring_failures_back(tmp_path: Path, launcher: list[str]) -> None:
    words = ["-m", "horen_bench", "-m", "seed=3,-1", *QUICK, *launcher]
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert "seed" in done.stderr
    assert "-1" in done.stderr
    assert len(list(tmp_path.glob("results/runs/*/checkpoints.csv"))) == 1


def test_the_cluster_settings_are_those_of_submitit() -> None:
    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        config = compose("config", ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"], return_hydra_config=True)
    launcher = config.hydra.launcher
    assert (launcher._target_.rpartition(".")[2], launcher.partition, launcher.gpus_per_node) == (
        "SlurmLauncher",
        "gpu",
        1,
    )
