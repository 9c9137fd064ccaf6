"""A wrong command line ends with exit code 2 and one sentence that names the setting, before torch is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The words of a command line, and what the sentence must say: the setting, what was given or what is allowed.
WRONG: list[tuple[str, tuple[str, ...]]] = [
    # --- numbers of a run
    ("n=-1", ("n ", "at least 1", "-1")),
    ("n=0", ("n ", "at least 1", "0")),
    ("n=2.5", ("n ", "whole number", "2.5")),
    ("n=many", ("n ", "whole number", "'many'")),
    ("n=true", ("n ", "whole number", "true")),
    ("n=null", ("n ", "whole number", "null")),
    ("n=[10]", ("n ", "whole number", "[10]")),
    ("n=1e3", ("n ", "whole number", "1000.0")),
    ("n=inf", ("n ", "whole number", "inf")),
    ("n=''", ("n ", "whole number", "''")),
    ("seed=-1", ("seed", "at least 0", "-1")),
    ("seed=0.5", ("seed", "whole number", "0.5")),
    ("seed=100000000000000000000000", ("seed", "9223372036854775808", "100000000000000000000000")),
    ("seed=null", ("seed", "whole number", "null")),
    ("seed=false", ("seed", "whole number", "false")),
    ("checkpoints=100", ("checkpoints", "list", "100")),
    ("checkpoints=[10,-1]", ("checkpoints", "at least 1", "-1")),
    ("checkpoints=[1.5]", ("checkpoints", "whole number", "1.5")),
    ("checkpoints=null", ("checkpoints", "list", "null")),
    ("checkpoints=[a]", ("checkpoints", "whole number", "'a'")),
    ("batch_size=0", ("batch_size", "at least 1", "0")),
    ("batch_size=null", ("batch_size", "whole number", "null")),
    ("threads=0", ("threads", "at least 1", "0")),
    ("threads=two", ("threads", "whole number", "'two'")),
    ("eval_cases=0", ("eval_cases", "at least 1", "0")),
    ("eval_cases=all", ("eval_cases", "whole number", "'all'")),
    ("save_every=often", ("save_every", "number", "'often'")),
    ("save_every=-1", ("save_every", "at least 0", "-1")),
    ("save_every=nan", ("save_every", "finite", "nan")),
    # --- choices of a run
    ("protocol=lenient", ("protocol", "'greedy'", "'lenient'")),
    ("protocol=[[greedy]]", ("protocol", "greedy")),
    ("protocol=[]", ("protocol", "at least 1", "[]")),
    ("protocol=5", ("protocol", "list", "5")),
    ("protocol=[greedy,loose]", ("protocol", "'greedy'", "'loose'")),
    ("protocol=null", ("protocol", "list", "null")),
    ("template=chat", ("template", "'model'", "'chat'")),
    ("template=null", ("template", "'model'", "null")),
    ("template_date=today", ("template_date", "2026-01-01", "'today'")),
    ("template_date=2026-02-30", ("template_date", "2026-01-01", "'2026-02-30'")),
    ("template_date=2026", ("template_date", "text", "2026")),
    ("locality=none", ("locality", "'clean'", "'none'")),
    ("force=no", ("force", "true or false", "'no'")),
    ("force=2", ("force", "true or false", "2")),
    ("force=null", ("force", "true or false", "null")),
    ("reuse=maybe", ("reuse", "true or false", "'maybe'")),
    ("device=meta", ("device", "meta")),
    ("device=gpu", ("device", "gpu")),
    ("device=5", ("device", "text", "5")),
    ("device=cuda:x", ("device", "cuda:x")),
    ("results_dir=null", ("results_dir", "text", "null")),
    ("results_dir=''", ("results_dir", "not empty", "''")),
    ("results_dir=[a]", ("results_dir", "text", "['a']")),
    ("data_dir=5", ("data_dir", "text", "5")),
    ("text=null", ("text", "group", "null")),
    ("text=5", ("text", "5")),
    ("text.max_new_tokens=0", ("text.max_new_tokens", "at least 1", "0")),
    ("text.minilm=5", ("text.minilm", "text", "5")),
    ("text.bert_score=true", ("text.bert_score", "text", "true")),
    ("template=model method=rome", ("template=model", "rome")),
    # --- parts that are not there
    ("model=null", ("model",)),
    ("method=null", ("method",)),
    ("model=tiney", ("model=tiney", "tiny")),
    ("method=horeen", ("method=horeen", "horen")),
    ("dataset=zrse", ("dataset=zrse", "zsre")),
    ("tracker=tensorboard", ("tracker=tensorboard", "wandb")),
    ("compat=old", ("compat=old", "release")),
    ("experiment=table99", ("experiment=table99", "table1")),
    ("~model", ("model",)),
    ("~method", ("method",)),
    ("~dataset", ("dataset",)),
    ("~tracker", ("tracker",)),
    ("~n", ("n ", "missing")),
    ("~seed", ("seed", "missing")),
    ("~method.threshold", ("method.threshold", "missing")),
    ("~method._target_", ("method", "_target_")),
    ("~nonsense", ("nonsense", "no such setting")),
    # --- names that are not there
    ("foo=1", ("foo", "no such setting")),
    ("+foo=1", ("foo", "no such setting")),
    ("++foo=1", ("foo", "no such setting")),
    ("+method.foo=1", ("method.foo", "no such setting")),
    ("+dataset.foo=1", ("dataset.foo", "no such setting")),
    ("+text.foo=1", ("text.foo", "no such setting")),
    ("+tracker.foo=1", ("tracker.foo", "no such setting")),
    ("+method.hopfield.foo=1", ("method.hopfield.foo", "no such setting")),
    ("+model.foo=1", ("model.foo", "1")),
    ("sede=1", ("sede", "did you mean seed?")),
    ("method.treshold=0.5", ("method.treshold", "did you mean method.threshold?")),
    ("method=wise method.engin=cached", ("method.engin", "did you mean method.engine?")),
    ("method=wise method.save_frq=2", ("method.save_frq", "did you mean method.save_freq?")),
    ("method=rome method.hidden.clmp=2", ("method.hidden.clmp", "did you mean method.hidden.clamp?")),
    ("dataset=zsre dataset.locality_sorce=record", ("dataset.locality_sorce", "did you mean dataset.locality_source?")),
    ("tracker=wandb tracker.projekt=a", ("tracker.projekt", "did you mean tracker.project?")),
    ("model.hub_idd=a", ("model.hub_idd", "did you mean model.hub_id?")),
    # --- words that are no setting
    ("=5", ("=5",)),
    ("n", ("n",)),
    ("n=[1", ("n=[1",)),
    ("n=1=2=", ("n=1=2=",)),
    ("method.threshold=${nowhere}", ("nowhere",)),
    ("method.threshold=${model.horen.nothing}", ("method=horen", "method.threshold")),
    ("n=${", ("n=${",)),
    # --- the model's settings
    ("model.dtype=32", ("model.dtype", "'float32'", "32")),
    ("model.dtype=float99", ("model.dtype", "'bfloat16'", "'float99'")),
    ("model.dtype=int8", ("model.dtype", "'bfloat16'", "'int8'")),
    ("model.device_map=balanced", ("model.device_map", "'auto'", "'balanced'")),
    ("model.hub_id=null", ("model.hub_id", "text", "null")),
    ("model.hub_id=7", ("model.hub_id", "text", "7")),
    ("model.memory_module=3", ("memory_module", "text", "3")),
    ("model.memory_module=a..b", ("model.memory_module", "a..b")),
    ("model.threads=0", ("threads", "at least 1", "0")),
    ("model.statistics.max_length=0", ("statistics.max_length", "at least 1", "0")),
    ("model.horen=5", ("model.horen", "method.threshold")),
    ("model.architecture=llama", ("model.architecture", "group", "'llama'")),
    # --- methods' settings
    ("method.threshold=1.5", ("method.threshold", "[-1, 1]", "1.5")),
    ("method.threshold=high", ("method.threshold", "number", "'high'")),
    ("method.pooling_ratio=2", ("method.pooling_ratio", "at most 1", "2")),
    ("method.pooling_ratio=null", ("method.pooling_ratio", "number", "null")),
    ("method.normalize=5", ("method.normalize", "true or false", "5")),
    ("method.adaptor=matrix", ("method.adaptor", "'lora'", "'matrix'")),
    ("method.n_steps=1.5", ("method.n_steps", "whole number", "1.5")),
    ("method.n_steps=-1", ("method.n_steps", "at least 0", "-1")),
    ("method.hopfield.beta=inf", ("method.hopfield.beta", "finite", "inf")),
    ("method.hopfield.beta=0", ("method.hopfield.beta", "above 0", "0")),
    ("method.hopfield.alpha=1.1", ("method.hopfield.alpha", "at most 1", "1.1")),
    ("method.hopfield.steps=1.5", ("method.hopfield.steps", "whole number", "1.5")),
    ("method.hopfield.steps=-1", ("method.hopfield.steps", "at least 0", "-1")),
    ("method.hopfield.eps=-1", ("method.hopfield.eps", "at least 0", "-1")),
    ("method.hopfield=null", ("method.hopfield", "group", "null")),
    ("method.vector.learning_rate=0", ("method.vector.learning_rate", "above 0", "0")),
    ("method.lora.rank=0", ("method.lora.rank", "at least 1", "0")),
    ("method.train_batch=0", ("method.train_batch", "at least 1", "0")),
    ("method.train_batch=abc", ("method.train_batch", "whole number", "'abc'")),
    ("method.early_stopping.patience=0", ("method.early_stopping.patience", "at least 1", "0")),
    ("method.early_stopping=5", ("method.early_stopping", "5")),
    ("method.engine=fast", ("method.engine", "'parallel'", "'fast'")),
    ("method.label_rule=loose", ("method.label_rule", "'tokens'", "'loose'")),
    ("method.module=null", ("method.module", "text", "null")),
    ("method.module=a..b", ("method.module", "a..b")),
    ("method._target_=nowhere.Config", ("method._target_", "nowhere")),
    ("method._target_=pathlib.Path", ("method._target_", "pathlib.Path")),
    ("method._target_=5", ("_target_",)),
    ("method=grace method.eps=0", ("method.eps", "above 0", "0")),
    ("method=grace method.threshold=0.5", ("method.threshold", "normalize")),
    ("method=grace method.replacement=first", ("method.replacement", "'replace_last'", "'first'")),
    ("method=grace method.decode_lookup=1", ("method.decode_lookup", "true or false", "1")),
    ("method=wise method.save_freq=0", ("method.save_freq", "at least 1", "0")),
    ("method=wise method.merge_freq=3 method.save_freq=2", ("method.merge_freq", "save_freq", "3 and 2")),
    ("method=wise method.mask_ratio=2", ("method.mask_ratio", "2")),
    ("method=wise method.act_margin=[1,2]", ("method.act_margin",)),
    ("method=wise method.loc_source=test", ("method.loc_source", "'disjoint'", "'test'")),
    ("method=repair method.side.density=2", ("method.side.density", "2")),
    ("method=repair method.distill=all", ("method.distill", "'logit'", "'all'")),
    ("method=rome method.hidden.n_steps=0", ("method.hidden.n_steps", "at least 1", "0")),
    ("method=rome method.key_mode=first", ("method.key_mode", "'release'", "'first'")),
    ("method=rome method.statistics.dtype=float16", ("method.statistics.dtype", "'float64'", "'float16'")),
    ("method=memit method.moment_weight=0", ("method.moment_weight", "above 0", "0")),
    ("method=memit method.modules=[]", ("method.modules", "at least 1", "[]")),
    ("method=memit method.modules=x", ("method.modules", "list", "'x'")),
    ("method=memit method.batch_size=1.5", ("method.batch_size", "whole number", "1.5")),
    ("method=alphaedit method.l2=-1", ("method.l2", "above 0", "-1")),
    ("method=ft_m method.learning_rate=0", ("method.learning_rate", "above 0", "0")),
    ("method=ft_l method.norm_constraint=0", ("method.norm_constraint", "above 0", "0")),
    ("method=ultraedit method.learning_rate=fast", ("method.learning_rate", "number", "'fast'")),
    ("method=unke method.batch_size=0", ("method.batch_size", "at least 1", "0")),
    ("method=unke method.value.n_steps=0", ("method.value.n_steps", "0")),
    # --- datasets' and trackers' settings
    ("dataset.stream_seed=-1", ("dataset.stream_seed", "at least 0", "-1")),
    ("dataset=zsre dataset.path=5", ("dataset.path", "text", "5")),
    ("dataset=zsre dataset.path=null", ("dataset.path", "text", "null")),
    ("dataset=zsre dataset.target=pred", ("dataset.target", "'answers'", "'pred'")),
    ("dataset=zsre dataset.locality_source=edit", ("dataset.locality_source", "'record'", "'edit'")),
    ("dataset=zsre dataset.train_path=null", ("dataset.locality_source", "dataset.train_path")),
    ("dataset=zsre dataset.strip_nq_prefix=no", ("dataset.strip_nq_prefix", "true or false", "'no'")),
    ("dataset=zsre dataset.conflicts=drop", ("dataset.conflicts", "'keep'", "'drop'")),
    ("dataset=zsre_50k dataset.paths=a.json", ("dataset.paths", "list", "'a.json'")),
    ("dataset=zsre_50k dataset.pool_size=0", ("dataset.pool_size", "at least 1", "0")),
    ("dataset=zsre_50k dataset.draw=all", ("dataset.draw", "whole number", "'all'")),
    ("dataset=zsre_50k dataset.draw_seed=true", ("dataset.draw_seed", "whole number", "true")),
    ("dataset=mquake dataset.part=unke", ("dataset.part", "'counterfact'", "'unke'")),
    ("tracker=wandb tracker.mode=dryrun", ("tracker.mode", "'offline'", "'dryrun'")),
    ("tracker=wandb tracker.project=null", ("tracker.project", "text", "null")),
    ("tracker=wandb tracker.tags=a", ("tracker.tags", "list", "'a'")),
]

# Runs every line in a fork of one process that has imported the command line, and nothing else.
_PROGRAM = """
import contextlib, io, json, os, sys
import horen_bench.command_line
from horen_bench.__main__ import main

def outcome(words):
    sys.argv = ["horen_bench", *words]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        except BaseException as error:
            code, _ = 1, said.write(f"Traceback: {error!r}")
    return code, said.getvalue(), sorted({"torch", "transformers", "pandas"} & set(sys.modules))

for words in json.load(sys.stdin):
    read, write = os.pipe()
    if os.fork() == 0:
        with os.fdopen(write, "w") as file:
            json.dump(outcome(words), file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        print(file.read())
    os.wait()
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, what was printed, and the heavy packages that were imported, by command line."""
    given = json.dumps([line.split(" ") for line, _ in WRONG])
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], input=given, capture_output=True, text=True, check=True, env=environment
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line: outcome for (line, _), outcome in zip(WRONG, lines, strict=True)}


def test_there_are_enough_of_them() -> None:
    assert len({line for line, _ in WRONG}) == len(WRONG) >= 120


@pytest.mark.parametrize(("line", "parts"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_command_line_is_answered_by_one_sentence(
    line: str, parts: tuple[str, ...], outcomes: dict[str, tuple[int, str, list[str]]]
) -> None:
    code, said, imported = outcomes[line]
    assert code == 2, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    assert len(said) < 400, said
    assert "Traceback" not in said
    assert [part for part in parts if part not in said] == [], said
    assert f"did you mean {said.removeprefix('error: ').partition(':')[0]}?" not in said
    assert imported == []


def test_the_command_itself_prints_the_sentence_and_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "horen_bench", "n=-1"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: n must be at least 1, got -1\n")
    assert list(tmp_path.iterdir()) == []
