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
    wanted, ours = (
        {name: tasks.score(model, stock.tokenizer, tasks.load(name, DATA, 12)) for name in names}
        for model in (stock.model, elastic)
    )
    # log-likelihoods of some 17 nats in float32
    likelihood, stocks = (scores["lambada_openai"].pop("perplexity") for scores in (ours, wanted))
    assert likelihood == pytest.approx(stocks, rel=1e-5)
    assert ours == wanted
    assert {len(values) for scores in wanted.values() for values in scores.values()} == {12}
    elastic.set_budget(widths=elastic.elastic.smallest())
    small = tasks.score(elastic, parent.tokenizer, tasks.load("lambada_openai", DATA, 12))
    full = tasks.summary({"perplexity": stocks})
    assert tasks.summary(small)["perplexity"] > 1.5 * full["perplexity"]


@needs_harness
def test_scores_are_those_of_the_harness_in_batches():
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    parent = load_parent("stories260k")
    asked = {"arc_easy": ("acc", "acc_norm"), "lambada_openai": ("acc", "perplexity")}
    loaded = {name: tasks.load(name, DATA, 12) for name in asked}
    harness = HFLM(pretrained=parent.model, tokenizer=parent.tokenizer, batch_size=8, device="cpu")
    wanted = simple_evaluate(
        harness, tasks=[*loaded["arc_easy"], *loaded["lambada_openai"]], bootstrap_iters=0
    )["results"]
    for name, metrics in asked.items():
        ours, own = tasks.summary(tasks.score(parent.model, parent.tokenizer, loaded[name])), wanted[name]
        assert [ours[m] for m in metrics] == pytest.approx([own[f"{m},none"] for m in metrics], rel=1e-4)


@needs_harness
def test_questions_are_drawn_from_the_whole_file_and_always_the_same():
    (all_of_them,), (few,), (again,) = (tasks.load("piqa", DATA, limit) for limit in (None, 20, 20))
    goals = [doc["goal"] for doc in all_of_them.eval_docs]
    drawn = [doc["goal"] for doc in few.eval_docs]
    assert drawn == [doc["goal"] for doc in again.eval_docs] and len(drawn) == 20
    assert goals.index(drawn[-1]) > len(goals) / 2 and set(drawn) <= set(goals)
    subjects = tasks.load("mmlu", DATA, 20)
    assert sum(len(task.eval_docs) for task in subjects) == 20 and len(subjects) > 10


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


def test_a_summary_has_means_and_their_standard_errors():
    found = tasks.summary({"acc": [1.0, 0.0, 0.0, 0.0], "perplexity": [-1.0, -3.0, -1.0, -3.0]})
    assert found["acc"] == 0.25 and found["acc_error"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert found["perplexity"] == pytest.approx(math.e**2)
    assert found["perplexity_error"] == pytest.approx(math.e**2 / 3**0.5) and found["n"] == 4
    assert tasks.summary({"acc": [1.0]}) == {"acc": 1.0, "n": 1}


def _first(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return json.loads(file.readline())
