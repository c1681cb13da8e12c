"""Benchmarks: the harness's own scores, from local files, identical to those of the stock parent at full width."""

import gzip
import json
import math

import pytest

from flextron.nn import make_elastic
from flextron_lab import tasks
from flextron_lab.demo import stories
from flextron_lab.demo.parents import load_parent

DATA = stories.data_folder() / "benchmarks"

pytestmark = pytest.mark.skipif(stories.find() is None, reason="stories260K is not here; set FLEXTRON_DATA")
needs_harness = pytest.mark.usefixtures("harness")


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[lm-eval]'")
    if not DATA.is_dir():
        pytest.skip("the benchmarks are not here; set FLEXTRON_DATA")


@needs_harness
def test_scores_at_full_width_are_those_of_the_stock_parent_and_fall_below_it():
    stock, parent = load_parent("stories260k"), load_parent("stories260k")
    elastic = make_elastic(parent.model)
    names = ("arc_easy", "piqa", "hellaswag", "winogrande", "lambada_openai")
    loaded = [task for name in names for task in tasks.load(name, DATA)]
    wanted = tasks.score(stock.model, stock.tokenizer, loaded, limit=12)
    ours = tasks.score(elastic, parent.tokenizer, loaded, limit=12)
    # The exponential of some 17 nats in float32: what is summed is compared, the mean log-likelihood.
    perplexity, stocks = (scores["lambada_openai"].pop("perplexity") for scores in (ours, wanted))
    assert math.log(perplexity) == pytest.approx(math.log(stocks), rel=1e-6)
    assert ours == wanted
    assert {name: metrics["n"] for name, metrics in wanted.items()} == dict.fromkeys(names, 12)
    elastic.set_budget(widths=elastic.elastic.smallest())
    lambada = [task for task in loaded if task.config.task == "lambada_openai"]
    small = tasks.score(elastic, parent.tokenizer, lambada, limit=12)["lambada_openai"]
    assert small["perplexity"] > 1.5 * stocks


@needs_harness
def test_questions_are_asked_as_the_harness_asks_them():
    """The first of each file, as its README says it is asked."""
    asked = {}
    for name in ("arc_easy", "piqa", "winogrande", "hellaswag"):
        (task,) = tasks.load(name, DATA)
        doc = next(iter(task.eval_docs))
        asked[name] = (task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc))
    rows = {name: _first(next(iter(tasks.TASKS[name].splits.values()))) for name in asked}
    arc, piqa, wino, swag = (rows[n] for n in ("arc_easy", "piqa", "winogrande", "hellaswag"))
    assert asked["arc_easy"] == (f"Question: {arc['question']}\nAnswer:", arc["choices"], arc["answer"])
    assert asked["piqa"] == (
        f"Question: {piqa['goal']}\nAnswer:",
        [piqa["sol1"], piqa["sol2"]],
        piqa["label"],
    )
    before, after = wino["sentence"].split("_")
    assert asked["winogrande"] == (
        wino["answer"] - 1, [before + wino["option1"], before + wino["option2"]], after.strip()
    )  # fmt: skip
    assert asked["hellaswag"][0] == f"{swag['activity_label']}: {swag['ctx_a']} {swag['ctx_b'].capitalize()}"
    assert asked["hellaswag"][2] == swag["label"]


@needs_harness
def test_mmlu_shows_five_examples_of_the_subject():
    loaded = tasks.load("mmlu", DATA)
    assert len(loaded) == 57
    task = loaded[0]
    assert task.config.task == "mmlu_abstract_algebra" and len(task.eval_docs) == 100
    shown = task.fewshot_context(task.eval_docs[0], task.config.num_fewshot)
    assert shown.count("Answer:") == 6 and shown.startswith("The following are multiple choice questions")


def test_unknown_tasks_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"eval: tasks must be among arc_easy, .*, got boolq"):
        tasks.check(["piqa", "boolq"], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"eval: --data-dir must hold piqa_val\.jsonl\.gz for piqa"):
        tasks.check(["piqa"], tmp_path)


def test_a_mean_over_subjects_is_one_over_questions():
    assert tasks._weighted([{"acc": 1.0, "n": 1}, {"acc": 0.0, "n": 3}]) == {"acc": 0.25, "n": 4}


def _first(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return json.loads(file.readline())
