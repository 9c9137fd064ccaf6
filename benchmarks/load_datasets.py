"""Loading 500,000 WikiBigEdit-format records: ours against `json.load` with a loop, and against `datasets`.

    python benchmarks/load_datasets.py [--records 500000]

Every way runs in a process of its own on the same generated files (eight of them, as published) and gives the same
number of validated edits. Reported: wall seconds from files to cases, and the peak resident memory of the process.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from horen_bench.cases import EditCase, Probe
from horen_bench.datasets.wikibigedit import TIME_STEPS, WikiBigEdit

FIELDS = ("update", "ans", "subject", "rephrase", "loc", "loc_ans", "personas", "mhop", "mhop_ans")


def generate(folder: Path, n_records: int) -> None:
    """Records with the published fields, lengths and gaps (a third of `mhop`-less rows in 33, some null locality)."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvwyz", k=rng.randint(3, 9))) for _ in range(20_000)]
    per_file = -(-n_records // len(TIME_STEPS))
    for number, step in enumerate(TIME_STEPS):
        size = min(per_file, n_records - number * per_file)
        records = [_record(rng, words) for _ in range(size)]
        (folder / f"wiki_big_edit_{step}.json").write_text(json.dumps(records))


def _record(rng: random.Random, words: list[str]) -> dict[str, object]:
    subject, other, target = (" ".join(rng.choices(words, k=2)).title() for _ in range(3))
    relation = " ".join(rng.choices(words, k=3))
    return {
        "tag": "new",
        "subject": subject,
        "update": f"What is the {relation} of {subject}?",
        "rephrase": f"Could you tell me what the {relation} of {subject} is?",
        "ans": target,
        "relation": relation,
        "object": target,
        "subject_id": f"Q{rng.randrange(10**8)}",
        "loc": f"What is the {relation} of {other}?" if rng.random() < 0.95 else None,
        "loc_ans": " ".join(rng.choices(words, k=2)),
        "personas": f"As a pirate, arr, what be the {relation} of {subject}?",
        "mhop": f"What is the home of the {relation} of {subject}?" if rng.random() < 0.03 else None,
        "mhop_ans": " ".join(rng.choices(words, k=2)),
    }


def ours(folder: Path, n: int) -> int:
    """The project's loader: every record validated, cases built."""
    return len(WikiBigEdit(path=str(folder)).cases(n))


def ours_head(folder: Path, n: int) -> int:
    """The first 1,000 edits by the project's loader; the first file is validated as a whole."""
    return len(WikiBigEdit(path=str(folder)).cases(min(n, 1000)))


def plain(folder: Path, n: int) -> int:
    """`json.load` on each file and a loop that checks types and builds the same cases."""
    cases: list[EditCase] = []
    for step in TIME_STEPS:
        with (folder / f"wiki_big_edit_{step}.json").open() as file:
            for record in json.load(file):
                if not all(isinstance(record[field], str) and record[field].strip() for field in FIELDS[:4]):
                    raise ValueError("bad record")
                locality = (Probe(record["loc"], record["loc_ans"]),) if record["loc"] else ()
                extras = {"personas": (Probe(record["personas"], record["ans"]),)}
                if record["mhop"]:
                    extras["mhop"] = (Probe(record["mhop"], record["mhop_ans"]),)
                cases.append(
                    EditCase(
                        str(len(cases)),
                        record["update"].strip(),
                        record["ans"].strip(),
                        record["subject"],
                        (record["rephrase"],),
                        locality,
                        {},
                        extras,
                    )
                )
    return len(cases[:n])


def with_datasets(folder: Path, n: int) -> int:
    """`datasets.load_dataset("json")` into Arrow, then a loop over its rows that checks types."""
    import datasets  # noqa: PLC0415

    files = [str(folder / f"wiki_big_edit_{step}.json") for step in TIME_STEPS]
    # Without types a field that is null in a file's first records is an error.
    names = json.loads(Path(files[0]).read_text(encoding="utf-8"))[0]
    features = datasets.Features({name: datasets.Value("string") for name in names})
    table = datasets.load_dataset(
        "json", data_files=files, split="train", cache_dir=str(folder / "cache"), features=features
    )
    return sum(all(isinstance(row[field], str) for field in FIELDS[:4]) for row in table.select(range(n)))


WAYS: dict[str, Callable[[Path, int], int]] = {
    "ours": ours,
    "ours, first 1,000": ours_head,
    "json.load + loop": plain,
    "datasets": with_datasets,
}


def _measure(way: str, folder: Path, n: int) -> dict[str, float]:
    """Run one way in a fresh process."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder), "--records", str(n)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


def main(argv: Sequence[str] | None = None) -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=500_000)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.way:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        count = WAYS[options.way](options.folder, options.records)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"cases": count, "seconds": seconds, "peak_mb": peak / 1024, "before_mb": before / 1024}))  # noqa: T201
        return
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder, options.records)
        megabytes = sum(file.stat().st_size for file in folder.glob("*.json")) / 2**20
        results = {way: _measure(way, folder, options.records) for way in WAYS}
    title = f"{options.records:,} records, {megabytes:.0f} MiB, Python {platform.python_version()}"
    table = Table("way", "cases", "seconds", "peak MiB", "time / ours", title=title)
    for way, times in results.items():
        ratio = times["seconds"] / results["ours"]["seconds"]
        table.add_row(
            way, f"{times['cases']:,.0f}", f"{times['seconds']:.1f}", f"{times['peak_mb']:.0f}", f"{ratio:.2f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
