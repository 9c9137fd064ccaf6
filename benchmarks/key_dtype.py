"""What keys in bfloat16 do to routing decisions: the same queries against the same codebook in both dtypes.

    python benchmarks/key_dtype.py --entries 2000

On the embedded model, whose own dtype is float32. Compared are the entry and the match of every edit prompt,
paraphrase, unrelated and hard-locality prompt of the stream.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from common import cases, horen, model_and_tokenizer, what_ran
from horen_bench.editors.codebook.entries import Codebook
from horen_bench.evaluation.probes import probes_of


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=2000)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    editor = horen(model_and_tokenizer("tiny", "cpu"), "tiny", n_steps=0)
    edits = cases(options.entries)
    editor.edit(edits)
    probes = probes_of(edits)
    queries = editor.queries(editor.encoder.prompts([probe.prompt for probe in probes]))
    wide = editor.codebook
    narrow = Codebook(wide.keys.shape[1], editor.adaptor.shapes, wide.keys.device, torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    decisions = []
    for codebook in (wide, narrow):
        editor.codebook = codebook
        matches = [editor.match(block) for block in torch.split(queries, 256)]
        decisions.append(
            [torch.cat([getattr(match, name) for match in matches]) for name in ("entries", "scores", "matched")]
        )
    (entries, scores, matched), (entries_narrow, scores_narrow, matched_narrow) = decisions
    table = Table("family", "probes", "other match", "matched: other entry", "largest change of a score")
    table.title = f"{what_ran('tiny', 'cpu')}; {len(wide)} entries, {time.strftime('%Y-%m-%d')}"
    families = [probe.family for probe in probes]
    for family in dict.fromkeys(families):
        rows = torch.tensor([name == family for name in families])
        other_match = (matched != matched_narrow)[rows].sum()
        other_entry = ((entries != entries_narrow) & matched & matched_narrow)[rows].sum()
        change = (scores - scores_narrow).abs()[rows].max()
        table.add_row(family, f"{rows.sum()}", f"{other_match}", f"{other_entry}", f"{change:.1e}")
    editor.detach()
    Console().print(table)


if __name__ == "__main__":
    main()
