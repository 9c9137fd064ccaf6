"""`python -m horen_bench.datasets fetch|inspect|list`: get published files, and see what they are made of."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from horen_bench.cases import EditCase
from horen_bench.config.compose import run_config
from horen_bench.config.schema import ModelConfig
from horen_bench.datasets.audit import composition, contradicting_paraphrases, most_mentioned, touched_probes
from horen_bench.datasets.sources import Source, fetch, manifest
from horen_bench.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    console = Console()
    options = _options(arguments)
    try:
        if options.command == "list":
            _list(console)
        elif options.command == "fetch":
            fetch(options.dataset, Path(options.data_dir), console)
        else:
            _inspect(options, console)
    except UserError as error:
        _complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _complain("stopped; what was downloaded is kept, and the same command goes on from there")
        return 130
    return 0


def _complain(sentence: str) -> None:
    Console(stderr=True).print(sentence, highlight=False, markup=False, soft_wrap=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments; settings such as `dataset.path=FILE` may stand anywhere behind the dataset."""
    parser = _parser()
    options, settings = parser.parse_known_args(arguments)
    unknown = [word for word in settings if "=" not in word or options.command != "inspect"]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.settings = settings
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m horen_bench.datasets", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what can be fetched, from where, under which licence")
    fetching = commands.add_parser("fetch", help="download the files of a dataset")
    fetching.add_argument("dataset", help=f"one of {', '.join(manifest())}")
    fetching.add_argument("--data-dir", default="data", help="where to put them (default: %(default)s)")
    inspecting = commands.add_parser(
        "inspect",
        help="what the first N cases are made of",
        epilog="Settings as for a run may follow, e.g. dataset.path=FILE.",
    )
    inspecting.add_argument("dataset", help="a dataset of conf/dataset/, e.g. wikibigedit")
    inspecting.add_argument("-n", type=_at_least(1), default=1000, help="cases (default: %(default)s)")
    inspecting.add_argument("--model", help="count tokens with the tokenizer of this model, e.g. qwen25_7b")
    inspecting.add_argument("--show", type=_at_least(0), default=3, help="records to print (default: %(default)s)")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"a whole number of at least {least} is needed, got {word!r}")
        return int(word)

    return number


def _list(console: Console) -> None:
    """A line for each fact: names and addresses are whole in a narrow terminal and in a pipe."""
    for name, sources in manifest().items():
        lines = [name, *(line for source in sources for line in _described(source))]
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _described(source: Source) -> list[str]:
    size = "" if source.n_bytes is None else f", {source.n_bytes:,} bytes"
    if source.has_checksum:
        check = f"sha256 {source.sha256}" if source.sha256 else f"git blob {source.git_blob}"
    elif source.hub:
        check = "checked against the hub's checksum"
    else:
        check = "no checksum is published"
    change = "; the newest version, which may change" if source.can_change else ""
    facts = (source.origin, f"{check}{size}{change}", f"licence: {source.licence}")
    return [f"  {source.file}", *(f"    {fact}" for fact in facts)]


def _inspect(options: argparse.Namespace, console: Console) -> None:
    overrides = [f"dataset={options.dataset}", *options.settings]
    if options.model:
        overrides.append(f"model={options.model}")
    config = run_config(overrides)
    cases = config.dataset.cases(options.n)
    _print_composition(cases, console)
    if options.model:
        _print_lengths(cases, config.model, console)
    for warning in config.dataset.warnings():
        console.print(f"note: {warning}", highlight=False, markup=False)
    for case in cases[: options.show]:
        console.print(case)


def _print_composition(cases: Sequence[EditCase], console: Console) -> None:
    counts = composition(cases)
    table = Table("probes", "cases that have one", "share", "probes in all", title=f"{counts.n} cases")
    for family, covered in counts.coverage.items():
        table.add_row(family, str(covered), f"{covered / counts.n:.1%}", str(counts.probes[family]))
    console.print(table)
    n_locality = counts.probes.get("locality", 0)
    share = f" ({counts.touched / n_locality:.1%})" if n_locality else ""
    for count, text in (
        (counts.conflicts, "cases whose prompt another case gives another target"),
        (counts.duplicates, "cases that repeat an earlier prompt and target"),
        (counts.same_paraphrase, "cases with a paraphrase equal to the prompt"),
        (counts.contradicting, "paraphrases that are given different targets; they cannot all be right"),
        (counts.subject_outside, "cases whose subject is not in the prompt"),
        (
            counts.touched,
            f"of {n_locality} locality probes touched by another edit{share}; locality=clean leaves them out",
        ),
    ):
        console.print(f"{count:>8} {text}", highlight=False, soft_wrap=True)
    for line in _examples(cases):
        console.print(f"         {line}", highlight=False, markup=False, soft_wrap=True)


def _examples(cases: Sequence[EditCase]) -> list[str]:
    """The most frequent contradicting paraphrases and mentioned subjects, and the first touched probes."""
    touched = touched_probes(cases)
    lines = [f"e.g. the paraphrase {text!r}, {n} times" for text, n in contradicting_paraphrases(cases).items()][:3]
    lines += [f"e.g. {n} probes mention {subject!r}" for subject, n in most_mentioned(touched)[:3] if n > 1]
    return lines + [f"e.g. {each.probe.prompt!r}, by the edit {cases[each.by].prompt!r}" for each in touched[:3]]


def _print_lengths(cases: Sequence[EditCase], model: ModelConfig, console: Console) -> None:
    # Imported here: the other commands do without torch and transformers.
    from horen_bench.models.loading import load_tokenizer  # noqa: PLC0415
    from horen_bench.prompts import PromptEncoder  # noqa: PLC0415

    encoder = PromptEncoder(load_tokenizer(model.hub_id, model.revision))
    prompts = sorted(map(len, encoder.prompts([case.prompt for case in cases])))
    targets = sorted(map(len, encoder.continuations([case.target for case in cases])))
    table = Table("tokens", "median", "90 %", "99 %", "longest", title=f"token lengths, {model.hub_id}")
    for name, lengths in (("prompt", prompts), ("target", targets)):
        quantiles = [lengths[min(len(lengths) - 1, int(share * len(lengths)))] for share in (0.5, 0.9, 0.99, 1)]
        table.add_row(name, *map(str, quantiles))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
