"""How scores, costs and families of probes are printed."""

MAIN = {"rel": "Rel", "gen": "Gen", "loc": "Loc", "op": "OP"}
COSTS = {
    "edits_per_second": "edits per second",
    "edit_seconds": "seconds in the editor so far",
    "eval_seconds": "seconds of evaluation",
    "inference_ms": "ms per probe",
    "peak_memory_bytes": "peak memory, bytes",
    "side_parameters": "numbers stored beside the model",
}
# The paper's Table 7: scores of whole answers to the edit's own prompt, to a paraphrase, to prompts about parts.
TEXT_FAMILIES = {"rel": "Original", "gen": "Paraphrase", "sub_question": "Sub-question"}
TEXT_METRICS = {
    "bleu1_bp": "BLEU",
    "rouge1_recall": "ROUGE-1",
    "rouge2_recall": "ROUGE-2",
    "rougeL_recall": "ROUGE-L",
    "minilm_cosine": "MiniLM cosine",
    "bert_score": "BERTScore",
}
TEXT = {
    f"{family}_{metric}": f"{prompt}, {score}"
    for family, prompt in TEXT_FAMILIES.items()
    for metric, score in TEXT_METRICS.items()
}


def printed(name: str) -> str:
    """The printed name of a column of scores or costs, e.g. `same subject` or `Original, rouge1 precision`."""
    known = MAIN | COSTS | TEXT
    if name in known:
        return known[name]
    family = text_family(name)
    return f"{TEXT_FAMILIES[family]}, {_spaced(name.removeprefix(f'{family}_'))}" if family else _spaced(name)


def text_family(name: str) -> str:
    """The family of probes that a text score is about; "" for the other scores."""
    return next((family for family in TEXT_FAMILIES if name.startswith(f"{family}_")), "")


def _spaced(name: str) -> str:
    return name.replace("_", " ")
