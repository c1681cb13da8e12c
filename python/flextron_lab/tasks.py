"""Benchmarks with the tasks and scoring of lm-evaluation-harness, on local files, at any budgets."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flextron.data import seeded
from flextron.nn.protocol import Elastic
from flextron_lab.prefixes import log_likelihoods

_SEED = 1234  # the harness's own for examples
METRICS = ("acc", "acc_norm", "perplexity")
Row = dict[str, Any]
Scores = dict[str, list[float]]
Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Source:
    """Where a task's rows are, and how one of them becomes a row that the harness knows.

    Attributes:
        config: the task's configuration file in the harness's folder of tasks.
        splits: maps each split of the harness to a file; questions are asked of the first.
        convert: turns a row of the file into a row of the data set that the harness was written for.
        shots: number of examples before each question; None leaves the harness's own number.
    """

    config: str
    splits: dict[str, str]
    convert: Callable[[Row], Row] = dict
    shots: int | None = None


def _arc(row: Row) -> Row:
    labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    return {
        "question": row["question"],
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["answer"]],
    }


TASKS = {
    "arc_easy": Source("arc/arc_easy.yaml", {"test": "arc_easy_test.jsonl.gz"}, _arc),
    "hellaswag": Source("hellaswag/hellaswag.yaml", {"validation": "hellaswag_val.jsonl.gz"}),
    "lambada_openai": Source("lambada/lambada_openai.yaml", {"test": "lambada_openai_test.jsonl.gz"}),
    "mmlu": Source(
        "mmlu/default/mmlu_{subject}.yaml",
        {"test": "mmlu_test.jsonl.gz", "dev": "mmlu_dev.jsonl.gz"},
        shots=5,
    ),
    "piqa": Source("piqa/piqa.yaml", {"validation": "piqa_val.jsonl.gz"}),
    "winogrande": Source(
        "winogrande/default.yaml",
        {"validation": "winogrande_xl_dev.jsonl.gz"},
        lambda row: row | {"answer": str(row["answer"])},
    ),
}


def check(tasks: Sequence[str], data_dir: str | Path) -> None:
    """Raise, before any work, for an unknown task or a missing file."""
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ValueError(f"eval: tasks must be among {', '.join(TASKS)}, got {', '.join(unknown)}")
    if not tasks:
        raise ValueError(f"eval: tasks must be among {', '.join(TASKS)}, got none")
    for name in tasks:
        for file in TASKS[name].splits.values():
            if not (Path(data_dir) / file).is_file():
                raise FileNotFoundError(f"eval: --data-dir must hold {file} for {name}, got {data_dir}")


def load(name: str, data_dir: str | Path, limit: int | None = None) -> list[Any]:
    """The harness's tasks for a benchmark, on local rows; MMLU has one task for every subject.

    ``limit``: how many questions are drawn, always the same ones, of all that the benchmark has; by default all.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the rows are local, so nothing may be fetched
    source = TASKS[name]
    rows = {split: _read(Path(data_dir) / file) for split, file in source.splits.items()}
    asked = next(iter(rows))
    rows[asked] = _drawn(rows[asked], limit, name)
    if "{subject}" not in source.config:
        return [_task(source, source.config, rows)]
    subjects = sorted({row["subject"] for row in rows[asked]})
    return [
        _task(
            source,
            source.config.format(subject=subject),
            {split: [r for r in all_rows if r["subject"] == subject] for split, all_rows in rows.items()},
        )
        for subject in subjects
    ]


def _drawn(rows: list[Row], limit: int | None, name: str) -> list[Row]:
    """So many rows in their order: files are sorted by subject or by source, and their first rows alike."""
    if limit is None or limit >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=seeded(f"tasks/{name}"))
    return [rows[i] for i in sorted(order[:limit].tolist())]


def score(model: Elastic, tokenizer: Any, tasks: Sequence[Any], *, batch_size: int = 8) -> Scores:
    """What the harness says of every question: metric -> [questions], in the order of the tasks and of their rows.

    Metrics are ``acc``, ``acc_norm``, and for LAMBADA ``perplexity``, of which a question has the log-likelihood.

    Args:
        model: a transformers causal LM; an elastic one is judged at its present budget.
        tokenizer: the model's own.
        tasks: tasks of one benchmark, from `load`.
        batch_size: sequences in a forward pass.
    """
    with _quietly():
        # not simple_evaluate, which reads all that the harness has and asks pip and git about the machine
        from lm_eval.evaluator import evaluate as run
        from lm_eval.models.huggingface import HFLM

        class Sharing(HFLM):
            def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> list[tuple[float, bool]]:
                pairs = [(context, end) for _, context, end in requests]
                return log_likelihoods(self.model, pairs, self.max_length, batch_size)

        judged = Sharing(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device)
        )
        asked = {task.config.task: task for task in tasks}
        found = run(judged, {"tasks": asked, "groups": {}}, bootstrap_iters=0)
    scores: Scores = {}
    for task in tasks:
        for question in sorted(found["samples"][task.config.task], key=lambda one: one["doc_id"]):
            for metric in METRICS:
                if metric in question:
                    scores.setdefault(metric, []).append(float(question[metric]))
    return scores


def summary(scores: Scores) -> Row:
    """The mean of each metric over questions, of several its standard error as ``<metric>_error``; their number ``n``.

    LAMBADA's perplexity is that of all words together.
    """
    row: Row = {}
    for metric, values in scores.items():
        row["n"] = n = len(values)
        mean = statistics.fmean(values)
        row[metric] = math.exp(-mean) if metric == "perplexity" else mean
        if n > 1:
            scale = row[metric] if metric == "perplexity" else 1.0
            row[f"{metric}_error"] = scale * statistics.stdev(values) / n**0.5
    return row


def evaluate(
    model: Elastic,
    tokenizer: Any,
    names: Sequence[str],
    budgets: Sequence[float],
    data_dir: str | Path,
    *,
    adaptive: bool = False,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Row]:
    """Run benchmarks of an elastic model at each budget; returns one row for every budget and benchmark.

    With ``adaptive`` the router chooses for every token at budgets below 1. MMLU's score is the mean over its
    questions, not over its subjects, as the harness weights its group; ``limit`` is what `load` takes.
    """
    check(names, data_dir)
    loaded = {name: load(name, data_dir, limit) for name in names}
    rows: list[Row] = []
    for budget in budgets:
        with model.budget(budget, adaptive=adaptive and budget < 1):
            for name, tasks in loaded.items():
                found = summary(score(model, tokenizer, tasks, batch_size=batch_size))
                rows.append(
                    {"budget": budget, "task": name, "params": model.elastic.params(model.widths), **found}
                )
                if progress is not None:
                    progress("benchmarks", len(rows), len(budgets) * len(loaded))
    return rows


def _read(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _task(source: Source, config: str, rows: dict[str, list[Row]]) -> Any:
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    splits = {split: Dataset.from_list([source.convert(row) for row in some]) for split, some in rows.items()}
    values = load_yaml(Path(lm_eval.__file__).parent / "tasks" / config)
    for key in ("tag", "group", "dataset_path", "dataset_name"):
        values.pop(key, None)
    for role in ("training", "validation", "test", "fewshot"):
        if values.get(f"{role}_split") not in splits:
            values[f"{role}_split"] = None
    values["custom_dataset"] = lambda **_: splits
    values["num_fewshot"] = source.shots if source.shots is not None else values.get("num_fewshot") or 0
    with _quietly():
        task = ConfigurableTask(config=values)
    task.set_fewshot_seed(seed=_SEED)
    return task


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the harness, which warns about local data and a loaded model and shows bars for copies."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, shown = logging.getLogger("lm_eval"), not are_progress_bars_disabled()
    before = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(before)
        if shown:
            enable_progress_bars()
