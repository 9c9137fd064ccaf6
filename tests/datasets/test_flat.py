"""One fact a record, from a file of one's own or a published one with flat fields."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from horen_bench.cases import EditCase, Probe
from horen_bench.config.compose import run_config
from horen_bench.datasets.flat import FlatRecords
from horen_bench.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"

FACTS = [
    {
        "prompt": "Who leads Ostmark?",
        "target": "Ada Voss",
        "subject": "Ostmark",
        "paraphrase": "Ostmark's head is",
        "locality_prompt": "Who leads Westmark?",
        "locality_ground_truth": "Bo Lind, the elder",
    },
    {"prompt": "Where is Bramdor?", "target": "in the \u2028north"},
]


def written(folder: Path, suffix: str, rows: Any) -> Path:
    path = folder / f"facts.{suffix}"
    table = pd.DataFrame(rows)
    if suffix == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",", encoding="utf-8-sig")
    return path


def read(path: Path, n: int = 1) -> list[EditCase]:
    return FlatRecords(path=str(path)).cases(n)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_cases(tmp_path: Path, suffix: str) -> None:
    assert read(written(tmp_path, suffix, FACTS), 2) == [
        EditCase(
            "0",
            "Who leads Ostmark?",
            "Ada Voss",
            "Ostmark",
            (Probe("Ostmark's head is", "Ada Voss"),),
            (Probe("Who leads Westmark?", "Bo Lind, the elder"),),
        ),
        EditCase("1", "Where is Bramdor?", "in the \u2028north"),
    ]


def test_locality_and_portability_may_come_by_family(tmp_path: Path) -> None:
    row = {
        "id": "x7",
        "prompt": "p",
        "target_new": "t",
        "paraphrases": ["q", "r"],
        "locality": {"Relation_Specificity": [{"prompt": "a", "ground_truth": [["b", "B"]]}], "None": []},
        "portability": {"Reasoning": [{"prompt": "c", "ground_truth": "d"}, {"prompt": "e", "ground_truth": []}]},
    }
    dataset = FlatRecords(path=str(written(tmp_path, "json", [row])))
    (case,) = dataset.cases(1)
    assert (case.id, [probe.prompt for probe in case.paraphrases]) == ("x7", ["q", "r"])
    assert case.hard_locality == {"relation_specificity": (Probe("a", "b"),)}
    assert case.extras == {"reasoning": (Probe("c", "d"),)}
    assert dataset.warnings() == [f"1 probes of {dataset.path} have an empty list of answers and were left out"]


def test_locality_may_be_a_list(tmp_path: Path) -> None:
    row = {"prompt": "p", "target": "t", "locality": [{"loc": "a", "loc_ans": "b"}, {"prompt": "c", "answer": "d"}]}
    assert read(written(tmp_path, "json", [row]))[0].locality == (Probe("a", "b"), Probe("c", "d"))


@pytest.mark.parametrize("several", [False, True])
def test_the_layout_of_counterfact(tmp_path: Path, several: bool) -> None:
    rewrite = {
        "prompt": "{} is a citizen of",
        "subject": "Ada {}",
        "target_new": {"str": "Ostmark"},
        "target_true": {"str": "Westmark"},
    }
    row = {
        "case_id": 12,
        "requested_rewrite": [rewrite, {}] if several else rewrite,
        "paraphrase_prompts": ["The passport of Ada is of"],
        "neighborhood_prompts": ["Bo is a citizen of"],
        "attribute_prompts": ["Cy is a citizen of"],
    }
    assert read(written(tmp_path, "json", [row])) == [
        EditCase(
            "12",
            "Ada {} is a citizen of",
            "Ostmark",
            "Ada {}",
            (Probe("The passport of Ada is of", "Ostmark"),),
            (Probe("Bo is a citizen of", "Westmark"),),
            {"attribute": (Probe("Cy is a citizen of", "Ostmark"),)},
        )
    ]


def test_fields_without_a_meaning_are_named(tmp_path: Path) -> None:
    dataset = FlatRecords(path=str(written(tmp_path, "json", [{"prompt": "p", "target": "t", "paraphrse": "q"}])))
    dataset.cases(1)
    (sentence,) = dataset.warnings()
    assert sentence.endswith("paraphrse")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("facts.json", '[{"prompt": "p"}]', "target_new"),
        ("facts.csv", "prompt,target\np,t\nq,a,b\n", "record 1 has 3 cells, its header 2"),
        ("facts.csv", 'prompt,target\n"p,t\n', "quotation marks"),
        ("facts.csv", "prompt,target\n", "n=1 is more than"),
        ("facts.parquet", "prompt,target\n", "no Parquet file"),
        ("facts.csv", b"prompt,target\np,\xff\n", "no UTF-8"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        read(tmp_path / name)


def test_a_missing_path_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"dataset\.path="):
        run_config(["dataset=records"]).dataset.cases(1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published records are not on this machine")
@pytest.mark.parametrize(
    ("file", "n", "coverage"),
    [
        ("wikibigedit/wikibigedit_3k.json", 3000, (3000, 3000)),
        ("counterfact/counterfact_3k.json", 3000, (3000, 3000)),
        ("counterfact/counterfact_1031_original_layout.json", 1031, (1031, 1031)),
        ("knowedit/ZsRE-test-all.json", 1304, (1304, 0)),
        ("knowedit/recent_train.json", 570, (0, 0)),
        ("qaedit/QAEdit_inter_1k.json", 1000, (1000, 1000)),
        ("mquake/MQuAKE-hard.json", 429, (0, 0)),
        ("hallucination/hallucination-edit.json", 600, (0, 600)),
    ],
)
def test_published_files_are_read_whole(file: str, n: int, coverage: tuple[int, int]) -> None:
    cases = read(SHARED / file, n)
    assert (sum(bool(case.paraphrases) for case in cases), sum(bool(case.locality) for case in cases)) == coverage
