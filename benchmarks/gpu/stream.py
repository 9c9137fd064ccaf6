"""Step `stream`: a long HoReN stream on a shape of about a billion parameters, as far as the time goes."""

from collections.abc import Iterator

from common import backbone, cases, horen
from gpu.suite import Figure, Step
from horen_bench.profiling import Stopwatch, peak_memory


def run(step: Step) -> None:
    """Edits per second, slice by slice."""
    step.measure("stream", lambda: stream(step))


def stream(step: Step) -> Iterator[Figure]:
    """Slices until the stream or the time ends; half a slice's time is kept to close."""
    settings = step.settings
    pair = backbone(settings["model"], step.device, **settings["architecture"])
    edits = cases(settings["n_edits"])
    # As in `throughput`: every edit is an insert that takes all steps.
    fixed = {"module": settings["module"], "threshold": 1.0, "early_stopping": None, "n_steps": settings["n_steps"]}
    editor = horen(pair, settings["model"], **fixed)
    done, seconds = 0, 0.0
    while done < len(edits) and step.clock.left() > 1.5 * seconds:
        watch = Stopwatch()
        part = edits[done : done + settings["slice"]]
        editor.edit(part)
        seconds = watch.elapsed()
        done += len(part)
        yield Figure(f"up to {done:,}", len(part) / seconds, "edits/s")
        yield Figure(f"peak memory up to {done:,}", peak_memory() / 2**30, "GiB")
    editor.detach()
    yield Figure("edits", done, f"of {len(edits):,}")
