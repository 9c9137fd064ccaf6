"""Earlier runs, copied to W&B from what the store holds of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from horen_bench.errors import UserError
from horen_bench.paths import resource
from horen_bench.results.store import RunStore
from horen_bench.tracking.config import WandbConfig
from horen_bench.tracking.wandb_tracker import WandbTracker, is_tracked


def upload(run_dir: Path, changes: Mapping[str, Any]) -> bool:
    """Copy what W&B lacks of one stored run, as if it had been tracked while it ran.

    Args:
        run_dir: the run's directory; `wandb.json` in it says what W&B has already.
        changes: tracker settings (project, entity, mode, tags) instead of those in conf/tracker/wandb.yaml.

    Returns:
        Whether there was anything to copy.

    Raises:
        UserError: the directory holds no finished checkpoint or is in use, or W&B refuses.
    """
    store = RunStore(run_dir)
    rows = store.rows()
    if not rows:
        raise UserError(f"{run_dir} is no run directory with a stored checkpoint; results/runs holds them.")
    with store.locked():
        if is_tracked(run_dir, rows):
            return False
        config = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
        assert isinstance(config, dict)
        tracker = WandbTracker(_settings(config, changes))
        tracker.start(run_dir, rows[0]["run"], {str(key): value for key, value in config.items()}, rows)
        tracker.finish(store.cases())
    if tracker.problem:
        raise UserError(f"{run_dir}: {tracker.problem}")
    return True


def defaults() -> DictConfig:
    """conf/tracker/wandb.yaml, unresolved."""
    loaded = OmegaConf.load(resource("conf") / "tracker" / "wandb.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded


def _settings(config: Mapping[Any, Any], changes: Mapping[str, Any]) -> WandbConfig:
    """The tracker's settings for a run, as the run itself would have resolved them."""
    whole = OmegaConf.create({"model": config["model"], "dataset": config["dataset"], "tracker": defaults()})
    resolved = OmegaConf.to_container(whole.tracker, resolve=True)
    assert isinstance(resolved, dict)
    return WandbConfig.model_validate(
        {str(key): value for key, value in {**resolved, **changes}.items() if key != "_target_"}
    )
