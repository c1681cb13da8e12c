"""The command line: a directory goes from stage to stage, and bad input gives one sentence and exit code 2."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from nn.models import small_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flextron import own_text, pipeline
from flextron.artefacts.adaptive_router import AdaptiveResult
from flextron.artefacts.directory import ElasticDirectory
from flextron.artefacts.noise import Noise
from flextron.checkpoint.hf import read_tokenizer
from flextron.cli import main
from flextron.cli.info import shown as as_read
from flextron.corpus import held_out_windows
from flextron.inference import from_pretrained
from flextron.judge.loss import divergence
from flextron.recipes import TuneConfig
from flextron_ext import build_info

QUIET = Noise(taken=0.0, drift=0.0, spread=0.0)
SENTENCE = "the cat sat on the mat and the dog ran far away from the old red house by the sea while it rained"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    generator = torch.Generator().manual_seed(0)
    words, lines = SENTENCE.split(), []
    for _ in range(60):
        picks = torch.randint(len(words), (80,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(words[i] for i in picks)}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def parent(tmp_path_factory, text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train([str(text)], special)
    path = tmp_path_factory.mktemp("parent")
    small_model(vocab_size=300).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        path
    )
    return path


COMMANDS = (
    "convert",
    "refit",
    "train",
    "profile",
    "route",
    "tune",
    "eval",
    "generate",
    "export",
    "info",
    "demo",
)
COMMANDS += ("sample", "report", "reproduce", "clean", "tokenize", "scale")


def answer(capsys, *argv):
    """What a command that must succeed prints with --json."""
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys, *argv):
    """The one sentence of a command that must fail; a conversion says before it what memory it will take."""
    assert main([*map(str, argv)]) == 2
    printed = capsys.readouterr()
    *before, told = printed.err.strip().splitlines()
    assert printed.out == "" and all(line.startswith("memory of the conversion: ") for line in before)
    return f"{told}\n"


@pytest.fixture(scope="module")
def converted(tmp_path_factory, parent, text):
    path = tmp_path_factory.mktemp("elastic") / "model"
    assert (
        main(["convert", str(parent), str(path), "--data", str(text), "--samples", "8", "--length", "32"])
        == 0
    )
    return path


def test_fitted_weights_are_stored_and_the_parent_teaches(converted, text, tmp_path, capsys):
    """A fit begins at the parent however often it is made, and what trains on it learns from the parent."""
    elastic = shutil.copytree(converted, tmp_path / "elastic")
    parent = load_file(elastic / "model.safetensors")
    options = (elastic, "--data", text, "--samples", 60, "--length", 32)
    found = answer(capsys, "refit", *options)
    assert found["tokens"] == 53 * 32 and all(row["after"] > 0 for row in found["losses"])
    fitted = load_file(elastic / "model.safetensors")
    moved = {name for name in parent if not torch.equal(parent[name], fitted[name])}
    assert moved and all(re.search("down_proj|o_proj", name) for name in moved)
    stored = json.loads((elastic / "flextron.json").read_text())["refit"]
    assert {k: v for k, v in stored.items() if k != "weights"} == found
    assert answer(capsys, "info", elastic)["parity is of"].startswith("the weights before")

    answer(capsys, "refit", *options, "--narrower", 0.1)
    again = shutil.copytree(converted, tmp_path / "again")
    answer(capsys, "refit", again, *options[1:], "--narrower", 0.1)
    for name, weight in load_file(again / "model.safetensors").items():
        assert torch.equal(weight, load_file(elastic / "model.safetensors")[name])

    train = ("train", elastic, "--data", text, *STEP, "--distillation", 1, "--checkpoint-every", 1)
    answer(capsys, *train)
    teacher = load_file(elastic / "training" / "teacher.safetensors")
    assert all(torch.equal(teacher[name], parent[name]) for name in parent)
    assert not (elastic / "refit").exists()
    told = complaint(capsys, "refit", elastic, "--narrower", 0)
    assert told == "flextron: refit: narrower must lie in (0, 1], got 0.0\n"


def test_without_data_the_parent_writes_the_text_once(converted, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(own_text, "LEAST", 600)
    elastic = shutil.copytree(converted, tmp_path / "elastic")
    file = elastic / own_text.FILE
    answer(capsys, "refit", elastic, "--samples", 8, "--length", 32)
    first = file.read_bytes()
    written = sum(json.loads(line)["tokens"] for line in first.splitlines())
    assert written >= 600
    (elastic / "same").mkdir()
    answer(capsys, "sample", elastic, elastic / "same" / "text", "--tokens", 600, "--length", 256)
    assert (elastic / "same" / "text").read_bytes() == first  # the model has 256 positions

    train = ("train", elastic, "--batch-size", 2, "--length", 32, "--eval-every", 0)
    answer(capsys, *train, "--steps", 2)
    assert file.read_bytes() == first
    assert answer(capsys, *train, "--steps", 400)["resumed_from"] == 2  # more steps, and the same text
    assert file.read_bytes() == first
    assert main([*map(str, (*train, "--steps", 1, "--restart", "--data", f"parent:{written + 1}"))]) == 0
    assert f"has {written} tokens where {written + 1} were asked for" in capsys.readouterr().err
    assert file.read_bytes() == first
    answer(capsys, "convert", converted, elastic, "--force", "--data", text, "--samples", 8, "--length", 32)
    assert not file.exists() and not (elastic / "refit").exists()


def test_more_of_the_parents_text_is_added_and_mixed_with_other(converted, text, tmp_path, capsys):
    elastic = shutil.copytree(converted, tmp_path / "elastic")
    file = elastic / own_text.FILE
    mixed = ("--data", text, "--weights", "1,2", "--samples", 9, "--length", 16)
    answer(capsys, "refit", elastic, "--data", "parent:300", *mixed)
    first = file.read_bytes()
    answer(capsys, "refit", elastic, "--data", "parent:30000", *mixed)  # the parent's weights are there still
    assert file.read_bytes().startswith(first) and len(file.read_bytes()) > len(first)
    told = complaint(capsys, "convert", converted, tmp_path / "new", "--data", "parent:300")
    assert told.startswith("flextron: text: the parent's own is for stages that change weights")
    told = complaint(capsys, "train", elastic, "--data", "parent:few", *STEP)
    assert told.startswith("flextron: text: the parent's own must be named as parent:TOKENS, got parent:few")


def test_a_model_that_forgets_what_its_text_is_unlike_is_told_of(
    converted, text, tmp_path, capsys, monkeypatch
):
    narrow = tmp_path / "narrow.jsonl"
    narrow.write_text("\n".join(json.dumps({"text": "the cat sat " * n}) for n in range(20, 80)))
    elastic = shutil.copytree(converted, tmp_path / "elastic")
    run = ("--steps", 30, "--batch-size", 4, "--length", 32, "--eval-every", 0, "--learning-rate", 1e-2)
    with monkeypatch.context() as patch:
        patch.delattr(pipeline, "_writer")  # the model that is trained writes, no second one
        assert main([*map(str, ("train", elastic, "--data", narrow, *run))]) == 0
    found = re.findall(
        r"train: on text that the parent writes .* loses \+.*this text -", capsys.readouterr().err
    )
    assert len(found) == 1 and not (elastic / own_text.FILE).exists()
    elastic = shutil.copytree(converted, tmp_path / "gentle")
    for data, rate in ((narrow, 1e-6), (f"parent:{own_text.LEAST}", 1e-2)):
        assert main([*map(str, ("train", elastic, "--data", data, *run[:-1], rate, "--restart"))]) == 0
        assert "on text that the parent writes" not in capsys.readouterr().err


def test_the_parent_writes_text_to_train_on(converted, text, tmp_path, capsys):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    elastic = tmp_path / "elastic"
    shutil.copytree(converted, elastic)
    wanted = ("--length", "24", "--batch-size", "4", "--seed", "3")
    report = answer(capsys, "sample", elastic, whole, "--tokens", "200", *wanted)
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert report == {"documents": len(lines), "tokens": sum(line["tokens"] for line in lines), "resumed": 0}
    assert report["tokens"] >= 200 and all(line["tokens"] <= 24 for line in lines)
    assert len({line["text"] for line in lines}) == len(lines)
    first = answer(capsys, "sample", elastic, parts, "--tokens", "60", *wanted)
    answer(capsys, "refit", elastic, "--data", text, "--samples", "8", "--length", "32")
    again = answer(capsys, "sample", elastic, parts, "--tokens", "200", *wanted)  # the parent writes still
    assert again["resumed"] == first["tokens"] < 200 and parts.read_bytes() == whole.read_bytes()
    assert answer(capsys, "sample", elastic, parts, "--tokens", "200", *wanted)["resumed"] == report["tokens"]
    trained = answer(
        capsys, "train", elastic, "--data", whole, "--steps", "1", "--length", "8", "--batch-size", "2"
    )
    assert trained["tokens"] == 16
    # weights that are trained write something else, and add nothing to what the parent wrote
    what = complaint(capsys, "sample", elastic, parts, "--tokens", "900", *wanted)
    assert (
        "must be new or made by the same call, got weights" in what
        and parts.read_bytes() == whole.read_bytes()
    )
    assert "seed 3, not 4" in complaint(capsys, "sample", converted, parts, *wanted[:-1], "4")
    assert "temperature must be above 0" in complaint(
        capsys, "sample", converted, parts, *wanted, "--temperature", "0"
    )
    assert "length must be at most" in complaint(capsys, "sample", converted, parts, "--length", "100000")
    assert parts.read_bytes() == whole.read_bytes()


def test_an_exported_network_may_be_fitted_for_itself(converted, text, tmp_path, capsys):
    options = (converted, tmp_path / "small", "--params", 50000, "--refit", 60, "--data", text)
    before = (converted / "model.safetensors").read_bytes()
    found = answer(capsys, "export", *options)
    assert found["refit"]["errors"]["mlp"][0]["after"] < found["refit"]["errors"]["mlp"][0]["before"]
    plain = answer(capsys, "export", converted, tmp_path / "plain", "--params", 50000)
    assert plain["widths"] == found["widths"] and "refit" not in plain
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("small", "plain")]
    moved = {name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])}
    assert moved and all(re.search("down_proj|o_proj", name) for name in moved)
    assert (converted / "model.safetensors").read_bytes() == before
    told = complaint(capsys, "export", converted, tmp_path / "out", "--data", text)
    assert told == "flextron: export: --data must go with --refit, got it alone\n"


def test_dtypes_and_certificate_are_said(parent, text, tmp_path, capsys):
    """A bfloat16 parent stays one in every file, and each command says so; a compiled one is told the mend."""
    tensors = load_file(parent / "model.safetensors")
    halves, compiled = (shutil.copytree(parent, tmp_path / name) for name in ("halves", "compiled"))
    save_file({k: v.bfloat16() for k, v in tensors.items()}, halves / "model.safetensors", {"format": "pt"})
    save_file(
        {f"_orig_mod.{k}": v for k, v in tensors.items()}, compiled / "model.safetensors", {"format": "pt"}
    )
    options = ("--data", text, "--samples", 8, "--length", 32)
    assert main([*map(str, ("convert", halves, tmp_path / "elastic", *options))]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"stored in bfloat16; read back as bfloat16 by stock transformers, within \d.*e-0\d of", said
    )
    assert (
        re.search(r"; 2 sub-networks within \d.*e-0\d of plain models$", said.strip())
        and "rounding" not in said
    )
    facts = answer(capsys, "info", tmp_path / "elastic")
    assert facts["stored in"] == {"bfloat16": 29} and facts["parity, rounding alone"] == 0
    assert main([*map(str, ("export", tmp_path / "elastic", tmp_path / "small"))]) == 0
    assert "stored in bfloat16; read back within" in capsys.readouterr().out
    assert main([*map(str, ("export", tmp_path / "elastic", tmp_path / "wide", "--dtype", "float32"))]) == 0
    assert "stored in float32" in (said := capsys.readouterr().out) and "rounding" not in said
    sizes = [(tmp_path / d / "model.safetensors").stat().st_size for d in ("elastic", "small", "wide")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01) and sizes[2] > 1.8 * sizes[1]
    told = complaint(capsys, "convert", compiled, tmp_path / "out", *options)
    assert "missing lm_head.weight" in told and "; --strip-prefix _orig_mod. " in told
    made = answer(
        capsys,
        "convert",
        compiled,
        tmp_path / "out",
        *options,
        "--strip-prefix",
        "_orig_mod.",
        "--dtype",
        "float16",
    )
    assert made["dtypes"] == {"float16": 29} and made["parity"]["rounding"]["max_rel"] > 1e-5


@pytest.fixture
def elastic(tmp_path, converted, monkeypatch):
    """A converted model; on it a profile is measured, but then says what a quiet machine would."""
    measured = pipeline.profile_model

    def steady(*args, **kwargs):
        table = measured(*args, **(kwargs | {"patience": 0}))
        layers = range(table.num_layers)
        return replace(
            table,
            mlp=tuple(tuple(map(float, table.elastic.mlp_choices)) for _ in layers),
            heads=tuple(tuple(map(float, table.elastic.head_choices)) for _ in layers),
            base=10.0,
            slope=1.0,
            held_out=(),
            noise=QUIET,
        )

    monkeypatch.setattr(pipeline, "profile_model", steady)
    timed = pipeline.measure_adaptive
    monkeypatch.setattr(
        pipeline, "measure_adaptive", lambda *a, **k: replace(timed(*a, **k), adaptive=(12.0, 1.0))
    )
    return shutil.copytree(converted, tmp_path / "elastic")


def test_every_stage_takes_the_directory_of_the_one_before(elastic, text, tmp_path, capsys):
    common = ("--data", text)
    trained = answer(
        capsys, "train", elastic, *common, "--steps", 4, "--batch-size", 2, "--length", 32, "--eval-every", 2,
        "--checkpoint-every", 2, "--distillation", 1,
    )  # fmt: skip
    assert len(trained["losses"]) == 4 and len(trained["evaluations"]) == 3
    answer(capsys, "profile", elastic, "--length", 16, "--context", 16, "--rounds", 2)
    batches = ("--phase", "decode", "--context", 16, "--batch", "1,3", "--rounds", 2)
    profiled = answer(capsys, "profile", elastic, *batches)  # prefill stays
    assert [(t["workload"]["phase"], t["workload"]["batch"]) for t in profiled["tables"]] == [
        ("prefill", 1),
        ("decode", 1),
        ("decode", 3),
    ]
    routers = answer(
        capsys, "route", elastic, *common, "--evaluations", 24, "--prefill", 16, "--steps", 20, "--length", 32,
        "--targets", "0.8,1",
    )  # fmt: skip
    assert routers["evaluations"] <= 24
    for form in ("search", "gumbel"):
        other = answer(
            capsys, "route", elastic, *common, "--evaluations", 24, "--prefill", 16, "--steps", 20, "--length", 32,
            "--targets", "0.8,1", "--form", form,
        )  # fmt: skip
        assert other["config"]["form"] == form
    before = [path.read_bytes() for path in (elastic / "latency").iterdir()]
    few = ("route", elastic, *common, "--adaptive", "--samples", 2, "--length", 32)
    assert "must be at least 16 sequences" in complaint(capsys, *few)
    assert [path.read_bytes() for path in (elastic / "latency").iterdir()] == before
    own = answer(
        capsys, "route", elastic, *common, "--adaptive", "--steps", 4, "--samples", 24, "--length", 32,
        "--targets", "0.8,1", "--gates", "hard",
    )  # fmt: skip
    assert own["targets"][0]["target"] == 0.8 and set(own["calibration"]) == {"prefill", "decode"}
    assert main(["eval", str(elastic), "--data", str(text), "--budgets", "1", "--rounds", "2"]) == 0
    assert "measured ms" in capsys.readouterr().out
    rows = answer(
        capsys, "eval", elastic, *common, "--budgets", "0.8,1", "--rounds", 2, "--length", 32, "--phase", "decode",
        "--batch", 4,
    )  # fmt: skip
    assert [row["kind"] for row in rows] == ["full", "routed", "uniform"]
    rows = answer(
        capsys, "eval", elastic, *common, "--draft", "--budgets", "0.7,0.8,1", "--rounds", 1, "--length", 12,
        "--max-new-tokens", 6, "--pack", "same",
    )  # fmt: skip
    assert [(row["prompts"], row["draft"]) for row in rows] == [
        (prompts, draft) for prompts in ("8 tokens", "12 tokens") for draft in (0.7, 0.8)
    ]
    assert all(row["same"] and row["speedup"] > 0 and row["accepted"] <= row["proposed"] for row in rows)
    assert all(row["spread"] == 0 and "disturbed" in row for row in rows)  # one round
    joint = ("tune", elastic, *common, "--steps", 2, "--batch-size", 2, "--length", 32, "--eval-every", 0)
    for which in ((), ("--adaptive", "--distillation", 1)):
        tuned = answer(capsys, *joint, *which, "--restart")
        again = answer(capsys, *joint, *which)
        assert len(tuned["losses"]) == 2 and again["losses"] == tuned["losses"] and again["resumed_from"] == 2
    rows = answer(
        capsys, "eval", elastic, *common, "--budgets", "0.8", "--rounds", 2, "--length", 32, "--adaptive"
    )
    assert [row["kind"] for row in rows] == ["full", "routed", "uniform", "adaptive"]
    exact = [row["loss"] for row in rows]
    for dtype, rtol in (("same", 1e-5), ("int8", 1e-2)):
        packed = answer(
            capsys, "eval", elastic, *common, "--budgets", "0.8", "--rounds", 2, "--length", 32, "--adaptive",
            "--pack", dtype,
        )  # fmt: skip
        losses = [row["loss"] for row in packed]
        assert losses == pytest.approx(exact, rel=rtol) and (losses != exact or dtype == "same")
    four = ("eval", elastic, *common, "--budgets", "1", "--rounds", 1, "--length", 32, "--pack", "int4")
    alone, fitted = (answer(capsys, *four, *more)[0]["loss"] for more in ((), ("--calibrate", 3)))
    assert alone != fitted and fitted == pytest.approx(exact[0], rel=0.05)
    told = answer(
        capsys,
        "generate",
        elastic,
        "--budget",
        0.8,
        "--adaptive",
        "--prompt",
        "the cat",
        "--max-new-tokens",
        4,
    )
    assert told["text"].startswith("the cat") and told["fraction"] == 0.8
    asked = ("generate", elastic, "--budget", 0.8, "--prompt", "the cat", "--max-new-tokens", 4)
    said = answer(capsys, *asked)
    assert said["text"].startswith("the cat")
    assert answer(capsys, *asked, "--pack", "same") == said
    fitted = answer(capsys, *asked, "--pack", "int4", "--calibrate", 3, "--data", text)
    assert fitted["text"].startswith("the cat")
    assert answer(capsys, *asked, "--draft-budget", 0.7, "--draft-tokens", 2) == said
    made = answer(capsys, "export", elastic, tmp_path / "small", "--budget", 0.8)
    assert made["params"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "small").parameters()
    )
    facts = answer(capsys, "info", elastic)
    ((machine, known),) = facts["latency tables"].items()
    after = "decode after 16 tokens"
    assert (
        list(known) == ["prefill of 16 tokens", after, f"{after}, batch 3"] and machine == profiled["machine"]
    )
    assert facts["routers"] == f"trained for {next(iter(known))} on {machine}"
    assert facts["adaptive router"] == "trained for prefill"
    assert answer(capsys, *asked, "--machine", machine, "--batch", 1) == said
    refused = complaint(capsys, *asked, "--machine", "nvidia-h200-bfloat16")
    assert f"budget: machine must be one of {machine}, got 'nvidia-h200-bfloat16'\n" in refused
    made = answer(capsys, "report", elastic, *common, "--budgets", "0.8", "--rounds", 2, "--length", 32)
    page = (elastic / "report.html").read_text(encoding="utf-8")
    assert made == {"page": str(elastic / "report.html")}
    headings = ("Loss against latency", "Router map", "Width of every token", "Surrogate", "Elastic training")
    assert all(f"<h2>{heading}</h2>" in page for heading in headings)
    assert page.count("<svg") == 6
    # Nothing is asked of anybody: what stands in quotes there are names of dialects and ids of the page's own.
    assert not re.findall(
        r"<(?:script|link|img|iframe)|@import|url\((?!#)|(?:src|href)=\"(?!#|data:image/png)", page
    )
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_what_was_measured_on_other_weights_does_not_survive(elastic, parent, text, capsys):
    common = ("--data", text, "--length", 32)
    answer(capsys, "profile", elastic, "--phase", "prefill", "--length", 16, "--rounds", 2)
    rows = answer(capsys, "eval", elastic, *common, "--budgets", "0.8", "--rounds", 2)
    assert [row["kind"] for row in rows] == ["full", "uniform"]  # no routers, nothing is called routed
    route = (
        "route",
        elastic,
        *common,
        "--evaluations",
        24,
        "--prefill",
        16,
        "--steps",
        5,
        "--targets",
        "0.8,1",
    )
    answer(capsys, *route)
    facts = answer(capsys, "info", elastic)
    assert facts["parity is of"] == "these weights" and len(facts["parity of sub-networks"]) == 2
    answer(capsys, "train", elastic, *common, "--steps", 1, "--batch-size", 2, "--dtype", "float16")
    facts = answer(capsys, "info", elastic)
    assert facts["parity is of"] == "the weights before they were trained or saved again"
    assert facts["stored in"] == {"float16": 29} and facts["stock transformers loads"] == "float16"
    assert facts["routers"] == facts["adaptive router"] == "none"
    assert [list(known) for known in facts["latency tables"].values()] == [["prefill of 16 tokens"]]
    answer(capsys, *route)
    answer(capsys, "convert", parent, elastic, *common, "--samples", 8, "--mlp-choices", "16,40", "--force")
    facts = answer(capsys, "info", elastic)
    assert facts["routers"] == "none" and facts["latency tables"] == {}
    assert not (elastic / "training").exists()


def test_a_table_measured_beside_other_programs_is_refused_until_it_is_accepted(elastic, text, capsys):
    decode = ("--phase", "decode", "--context", 16, "--rounds", 2)
    answer(capsys, "profile", elastic, *decode)
    (path,) = elastic.glob("latency/*.json")
    stored = json.loads(path.read_text())
    stored["tables"][0]["noise"]["taken"] = 0.31
    stored["tables"][0]["of a later version"] = {"kept": 1}
    path.write_text(json.dumps(stored))
    doubt = "must be within 10%, got one that was measured while other programs took 31% of the processors"
    common = (elastic, "--data", text, "--phase", "decode", "--length", 32)
    for command in ("route", "eval"):
        said = complaint(capsys, command, *common)
        assert said.startswith(f"flextron: {command}: the latency table of decode after 16 tokens on ")
        assert doubt in said and "or go on with --accept-noise" in said
    assert main([*map(str, ("eval", *common, "--budgets", "0.8,1", "--rounds", 2, "--accept-noise"))]) == 0
    printed = capsys.readouterr()
    assert "±" in printed.out and "warning: the latency table of decode after 16 tokens" in printed.err
    assert "may be wrong by 31%" in str(answer(capsys, "info", elastic)["latency tables"])

    prompt = ("--prompt", "the cat", "--max-new-tokens", 5)
    assert main([*map(str, ("generate", elastic, "--latency-ms", 1e4, "--phase", "decode", *prompt))]) == 0
    assert doubt in capsys.readouterr().err
    hold = ("--latency-ms", 1e4, "--phase", "decode", "--hold", "--floor", 0.9)
    told = answer(capsys, "generate", elastic, *hold, *prompt)
    assert told["within"] == 1 and told["budgets"] == [1.0] * 5 and told["ms"][0] is None
    assert main([*map(str, ("generate", elastic, "--deadline-ms", 1e6, *prompt))]) == 0
    assert re.search(
        r"of 1e\+06 ms for 5 tokens; budgets from 1.00 to 1.00, 1.00 in the", capsys.readouterr().out
    )
    refused = complaint(capsys, "generate", elastic, "--deadline-ms", 9, "--budget", 0.5, *prompt)
    assert "--deadline-ms must be given without another budget, got --budget" in refused
    answer(capsys, "profile", elastic, "--phase", "prefill", "--length", 16, "--rounds", 2)
    kept = next(t for t in json.loads(path.read_text())["tables"] if t["workload"]["phase"] == "decode")
    assert kept["of a later version"] == {"kept": 1} and kept["noise"]["taken"] == 0.31


ROUTE = ("--evaluations", 24, "--prefill", 16, "--steps", 5, "--targets", "0.8,1", "--length", 32)
ADAPTIVE = ("--adaptive", "--steps", 2, "--samples", 24, "--length", 32, "--targets", "0.8,1")
PROFILE = ("--phase", "prefill", "--length", 16, "--rounds", 2)
STEP = ("--steps", 1, "--batch-size", 2, "--length", 32, "--eval-every", 0)


def test_what_the_routers_choose_is_fitted_and_trained_and_the_routers_stay(elastic, text, capsys):
    common = (elastic, "--data", text)
    fit = ("refit", *common, "--ladder", "--samples", 8, "--length", 32)
    train = ("train", *common, "--ladder", "--distillation", 1, *STEP, "--steps", 3, "--eval-every", 3)
    told = f"flextron: refit: {elastic} must have the router made for its weights, for its ladder, got none; "
    assert complaint(capsys, *fit) == f"{told}run `flextron route {elastic}`\n"
    assert complaint(capsys, *train) == f"{told}run `flextron route {elastic}`\n".replace("refit:", "train:")
    answer(capsys, "profile", elastic, *PROFILE)
    answer(capsys, "route", *common, *ROUTE)
    (routed,) = _choices(elastic)
    parent = load_file(elastic / "model.safetensors")
    found = answer(capsys, *fit)
    assert [row["target"] for row in found["losses"]] == [0.8, 1.0]
    fitted = load_file(elastic / "model.safetensors")
    moved = {name for name in parent if not torch.equal(parent[name], fitted[name])}
    assert moved and all(re.search("down_proj|o_proj", name) for name in moved)
    assert _choices(elastic) == [routed]

    trained = answer(capsys, *train)
    assert [row["mlp"] for row in trained["evaluations"][-1]["sub_networks"]] == [
        list(routed.mlp),
        list(from_pretrained(elastic).elastic.full().mlp),
    ]
    run = json.loads((elastic / "training" / "run.json").read_text())
    assert run["config"]["networks"] == [routed.to_dict()]
    teacher = load_file(elastic / "training" / "teacher.safetensors")
    assert all(torch.equal(teacher[name], parent[name]) for name in parent)
    assert _choices(elastic) == [routed]
    model = from_pretrained(elastic)
    with ElasticDirectory.open(elastic) as checkpoint:
        (target,) = checkpoint.static().targets
    judged = pipeline.windows(pipeline.corpus(read_tokenizer(elastic), text).train, 4, 32)
    assert target.routed_observed == pytest.approx(divergence(model, judged)(routed), rel=1e-4)
    more = answer(capsys, *train[:-4], "--steps", 4, *train[-2:])  # the ladder is the one that it was
    assert more["resumed_from"] == 3


def _choices(elastic):
    """What the stored routers choose at their targets below 1."""
    with ElasticDirectory.open(elastic) as checkpoint:
        return list(pipeline._Routed.of("test", checkpoint).networks)


def killed(*_):
    raise KeyboardInterrupt


def test_routers_of_other_weights_are_never_used(elastic, text, monkeypatch, capsys):
    """A run killed between its weights and its end, and resumed; then routers copied in from another checkpoint."""
    answer(capsys, "profile", elastic, *PROFILE)
    answer(capsys, "route", elastic, "--data", text, *ROUTE)
    routers = {path.name: path.read_bytes() for path in elastic.glob("routers.*")}
    assert len(routers) == 2 and from_pretrained(elastic).planner.ladder.origin == "router"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_discard", killed)
        assert main([*map(str, ("train", elastic, "--data", text, *STEP))]) == 130
    capsys.readouterr()
    left_out = r"routers\.json: was made for other weights .* left out; run `flextron route"
    with pytest.warns(UserWarning, match=left_out):
        assert from_pretrained(elastic).planner.ladder.origin == "uniform"
    assert answer(capsys, "train", elastic, "--data", text, *STEP)["resumed_from"] == 1
    assert not list(elastic.glob("routers.*"))
    for name, content in routers.items():
        (elastic / name).write_bytes(content)
    with pytest.warns(UserWarning, match=left_out):
        assert from_pretrained(elastic).planner.ladder.origin == "uniform"
    with (
        pytest.warns(UserWarning, match=left_out),
        pytest.raises(ValueError, match="got none; run `flextron route"),
    ):
        pipeline.tune(elastic, TuneConfig(length=32))
    answer(capsys, "route", elastic, "--data", text, *ROUTE)
    assert from_pretrained(elastic).planner.ladder.origin == "router"


def test_files_of_another_model_are_refused_until_the_named_command_is_run(
    elastic, text, monkeypatch, capsys
):
    """The menus are the same; the other model has another vocabulary, so every forward takes other time."""
    monkeypatch.setattr("flextron.routing.calibrate._BISECTIONS", 2)
    answer(capsys, "profile", elastic, *PROFILE)
    (path,) = elastic.glob("latency/*.json")
    path.write_text(path.read_text().replace('"vocab_size": 300', '"vocab_size": 302'))
    here = json.loads((elastic / "flextron.json").read_text())["elastic"]
    other = {"format": 1, "made_for": {"elastic": {**here, "vocab_size": 302}, "weights": "0" * 64}}
    for name in ("routers.json", "adaptive.json"):
        (elastic / name).write_text(json.dumps(other))
    asked = ("generate", elastic, "--params", 1e9, "--prompt", "the cat", "--max-new-tokens", 1)
    for name, stage, mend in (
        (
            path.name,
            ("profile", elastic, *PROFILE),
            f"profile {elastic}` on that machine, or remove the file",
        ),
        ("routers.json", ("route", elastic, "--data", text, *ROUTE), f"route {elastic}`"),
        ("adaptive.json", ("route", elastic, "--data", text, *ADAPTIVE), f"route {elastic} --adaptive`"),
    ):
        said = complaint(capsys, *asked)
        assert f"{name}: must be made for the model here, got one of vocab_size 302 instead of 300;" in said
        assert said.endswith(f"run `flextron {mend}\n")
        answer(capsys, *stage)
    answer(capsys, *asked)


def test_tuning_stores_weights_and_routers_together(elastic, text, monkeypatch, capsys):
    """Killed in between it changes nothing, and afterwards both routers are calibrated for the new weights."""
    monkeypatch.setattr("flextron.routing.calibrate._BISECTIONS", 2)
    answer(capsys, "profile", elastic, *PROFILE)
    answer(capsys, "route", elastic, "--data", text, *ROUTE)
    answer(capsys, "route", elastic, "--data", text, *ADAPTIVE)
    names = ("model.safetensors", "routers.json", "adaptive.json")
    before = {name: (elastic / name).read_bytes() for name in names}
    tune = ("tune", elastic, "--data", text, *STEP)
    with monkeypatch.context() as patch:
        patch.setattr(AdaptiveResult, "write", killed)
        assert main([*map(str, tune)]) == 130
    capsys.readouterr()
    assert all((elastic / name).read_bytes() == before[name] for name in names)
    answer(capsys, *tune)
    assert not any((elastic / name).read_bytes() == before[name] for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = from_pretrained(elastic)
    assert model.planner.ladder.origin == "router" and model.adaptive is not None


def test_training_again_resumes_a_finished_run_and_changes_nothing(elastic, text, capsys):
    argv = ("train", elastic, "--data", text, "--steps", 2, "--batch-size", 2, "--length", 32)
    first = answer(capsys, *argv)
    weights = (elastic / "model.safetensors").read_bytes()
    again = answer(capsys, *argv)
    assert again["resumed_from"] == 2 and again["losses"] == first["losses"]
    assert (elastic / "model.safetensors").read_bytes() == weights
    assert "got --seed 1 instead of 0;" in complaint(capsys, *argv, "--seed", 1)
    assert answer(capsys, *argv, "--seed", 1, "--restart")["resumed_from"] == 0


def test_a_finished_run_goes_on_with_the_teacher_that_it_began_with(elastic, text, capsys):
    """Which is not what the directory holds by then: at full width the trained model would not diverge from itself."""
    run = ("train", elastic, "--data", text, "--batch-size", 2, "--length", 32, "--eval-every", 0)
    run += ("--distillation", 1, "--full-probability", 1, "--learning-rate", 0.01, "--no-bf16")
    short = answer(capsys, *run, "--steps", 2)
    more = answer(capsys, *run, "--steps", 3)
    assert more["resumed_from"] == 2 and len(more["losses"]) == 3 and more["losses"][:2] == short["losses"]
    lines = (elastic / "training/metrics.jsonl").read_text().splitlines()
    divergences = [json.loads(line)["distillation"] for line in lines]
    assert divergences[0] < 1e-4 < 1e-2 < min(divergences[1:])
    assert answer(capsys, *run, "--steps", 3)["resumed_from"] == 3
    assert "got --steps 2 instead of 3;" in complaint(capsys, *run, "--steps", 2)


def test_cleaning_removes_what_only_resuming_needs(elastic, text, capsys):
    run = ("train", elastic, "--data", text, *STEP, "--distillation", 1)
    first = answer(capsys, *run)
    before = {path: path.read_bytes() for path in elastic.rglob("*") if path.is_file()}
    dry = answer(capsys, "clean", elastic, "--dry-run")
    assert before == {path: path.read_bytes() for path in elastic.rglob("*") if path.is_file()}
    gone = answer(capsys, "clean", elastic)
    assert gone["files"] == dry["files"] and gone["bytes"] == dry["bytes"] > 3 * 0.1e6
    training = elastic / "training"
    names = (
        "step-00000001.json",
        "step-00000001/shard-00001-model-00001-of-00001.safetensors",
        "teacher.safetensors",
    )
    assert list(gone["files"]) == [str(training / name) for name in names]
    kept = {path: content for path, content in before.items() if str(path) not in gone["files"]}
    assert {training / "metrics.jsonl", training / "run.json"} < kept.keys()
    now = {path: path.read_bytes() for path in elastic.rglob("*") if path.is_file()}
    changed = training / "run.json"
    assert {**now, changed: b""} == {**kept, changed: b""}
    assert answer(capsys, "clean", elastic) == {"files": {}, "bytes": 0, "dry_run": False}
    assert "cleaned away" in complaint(capsys, *run)  # not begun again unasked, on trained weights
    assert main([*map(str, run), "--restart"]) == 0
    assert first["resumed_from"] == 0


def test_a_run_that_was_stopped_is_not_cleaned_unasked(elastic, text, monkeypatch, capsys):
    run = ("train", elastic, "--data", text, *STEP[2:], "--steps", 2, "--checkpoint-every", 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            "flextron.training.metrics.MetricsLog.write", lambda log, record: record["step"] < 2 or killed()
        )
        assert main([*map(str, run)]) == 130
    capsys.readouterr()
    assert "must be finished, got step 1 of 2; " in complaint(capsys, "clean", elastic)
    assert answer(capsys, *run)["resumed_from"] == 1
    assert answer(capsys, "clean", elastic)["bytes"] > 0


def test_conversion_options_change_the_checkpoint(parent, text, tmp_path, capsys):
    def weights(name, *options):
        argv = ("convert", parent, tmp_path / name, "--data", text, "--samples", 8, "--length", 32, *options)
        answer(capsys, *argv)
        meta = json.loads((tmp_path / name / "flextron.json").read_text())
        return (tmp_path / name / "model.safetensors").read_bytes(), meta

    plain, meta = weights("plain")
    orders = {
        "plain": plain,
        "variance": weights("variance", "--aggregate", "variance")[0],
        "none": weights("none", "--order", "none")[0],
        "random": weights("random", "--order", "random")[0],
        "seed": weights("seed", "--order", "random", "--seed", "1")[0],
    }
    assert len(set(orders.values())) == len(orders)
    for flag, key, menu in (
        ("--mlp-choices", "mlp_choices", [16, 40]),
        ("--head-choices", "head_choices", [2, 4]),
    ):
        changed = weights(flag.strip("-"), flag, ",".join(map(str, menu)))[1]
        assert changed["elastic"][key] == menu != meta["elastic"][key]
    assert weights("unit", "--unit", "query")[1]["elastic"]["unit"] == "query" != meta["elastic"]["unit"]


def test_bad_input_gives_one_sentence(elastic, parent, text, tmp_path, capsys):
    cases = {
        ("eval", elastic, "--data", text): "flextron profile",
        ("route", elastic, "--data", text): "flextron profile",
        ("generate", elastic, "--budget", 0.5, "--prompt", "x"): "flextron profile",
        ("generate", elastic, "--params", 10, "--prompt", "x"): "smallest",
        ("generate", elastic, "--params", 10, "--adaptive", "--prompt", "x"): "one of latency",
        ("eval", elastic, "--data", text, "--adaptive"): "flextron profile",
        ("route", elastic, "--gates", "soft"): "with --adaptive only",
        ("route", elastic, "--adaptive", "--evaluations", 5): "--evaluations must not be given",
        ("route", elastic, "--adaptive", "--prefill", 20): "--prefill must be given",
        ("route", elastic, "--adaptive", "--form", "search"): "form must be one of gumbel, surrogate",
        ("eval", elastic, "--limit", 3): "--limit must be given with --tasks only",
        ("eval", elastic, "--max-new-tokens", 3): "--max-new-tokens must be given with --draft only",
        ("eval", elastic, "--draft", "--adaptive"): "--draft must be given without --adaptive",
        ("generate", elastic, "--prompt", "x", "--draft-tokens", 2): "must be given with a draft_budget",
        ("eval", elastic, "--tasks", "piqa", "--data", text): "--data must be given without --tasks",
        ("eval", elastic, "--calibrate", 3): "--calibrate must be given with --pack int4, got no --pack",
        ("generate", elastic, "--prompt", "x", "--pack", "int8", "--calibrate", 3): "int4, got --pack int8",
        ("generate", elastic, "--prompt", "x", "--data", text): "--data must be given with --calibrate only",
        ("generate", elastic, "--prompt", ""): "prompt must have at least one token, got ''",
        (
            "generate",
            elastic,
            "--params",
            1e9,
            "--context",
            9,
            "--prompt",
            "x",
        ): "must not be given with params",
        ("convert", parent, tmp_path / "x", "--field", "text"): "--field must be given with --data",
        ("eval", elastic, "--tasks", "boolq"): "tasks must be among arc_easy",
        ("eval", elastic, "--tasks", "piqa", "--data-dir", tmp_path): "must hold piqa_val.jsonl.gz",
        ("report", elastic, "--data", text): "flextron profile",
        ("reproduce", "--out", tmp_path / "s", "--parents", "gpt9"): "parents must be among stories260k",
        ("reproduce", "--out", tmp_path / "s", "--stages", "dance"): "stages must be among prepare",
        ("train", elastic, "--data", text, "--learning-rate", -1): "learning_rate",
        ("train", elastic, "--length", 32, "--data", tmp_path / "no.txt"): "must exist",
        **{
            (
                stage,
                elastic,
                "--data",
                text,
                "--length",
                257,
            ): f"{stage}: length must be at most the 256 positions"
            for stage in ("train", "tune", "route")
        },
        ("eval", elastic, "--data", text, "--length", 257): "--length must be at most the 256 positions",
        ("convert", parent, parent, "--data", text): "another directory",
        (
            "convert",
            parent,
            tmp_path / "x",
            "--data",
            text,
            "--mlp-choices",
            "8,16",
        ): "mlp_choices must ascend",
        ("export", elastic, elastic): "must not be an elastic checkpoint",
        ("convert", tmp_path / "nothing", tmp_path / "x", "--data", text): "nothing",
        ("info", tmp_path): "flextron.json",
        ("demo", "--parent", tmp_path / "nothing", "--out", tmp_path / "d"): "nothing",
    }
    for argv, words in cases.items():
        assert words in complaint(capsys, *argv), argv
    assert not (tmp_path / "x").exists()


def test_a_gguf_file_is_exported(converted, tmp_path, capsys):
    file = tmp_path / "small.gguf"
    argv = ("export", converted, file, "--format", "gguf", "--params", 80000, "--type", "f32")
    report = answer(capsys, *argv)
    assert report["types"].keys() == {"f32"} and report["parity"]["max_rel"] < 1e-4
    assert "must not be there yet" in complaint(capsys, *argv)
    assert main([*map(str, (*argv[:-1], "f16", "--force"))]) == 0
    assert re.search(
        r"parameters, \w+ in (llama|deci), .* MB of \d+ f16, \d+ f32; read back", capsys.readouterr().out
    )
    for other, name in (((), "--type"), (("--format", "gguf"), "--dtype")):
        given = (
            "export",
            converted,
            tmp_path / "x.gguf",
            name,
            "f16" if name == "--type" else "float16",
            *other,
        )
        assert f"export: {name} must be given with" in complaint(capsys, *given)


def test_a_demonstration_replaces_nothing_but_a_demonstration(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "got" in complaint(capsys, "demo", "--parent", "tiny", "--out", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_stage_takes_folders_of_tokens_and_mixtures(elastic, parent, text, tmp_path, capsys):
    tokens = tmp_path / "tokens"
    said = answer(capsys, "tokenize", text, tokens, "--model", elastic, "--held-out", "0.1", "--workers", "1")
    assert said["documents"] == 60 and 0 < said["held_out"] < said["tokens"]
    assert main(["tokenize", str(text), str(tokens), "--model", str(elastic), "--held-out", "0.1"]) == 0
    assert "every file is as it was written" in capsys.readouterr().out
    mixed = ["--data", tokens, "--data", text, "--weights", "3,1"]
    steps = ["--steps", "2", "--length", "32", "--batch-size", "4"]
    first = answer(capsys, "train", elastic, *mixed, *steps)
    assert len(first["losses"]) == 2
    assert answer(capsys, "train", elastic, *mixed, *steps)["resumed_from"] == 2
    rows = tmp_path / "reviews.csv"
    rows.write_text("title,body\n" + "\n".join(f"no word,the cat sat {'and ran ' * n}" for n in range(40)))
    fielded = ["--data", tokens, "--data", rows, "--data", text.with_suffix(".txt"), "--field", "body"]
    text.with_suffix(".txt").write_text("the old red house by the sea " * 100)
    assert len(answer(capsys, "train", elastic, *fielded, *steps, "--restart")["losses"]) == 2
    for argv, says in (
        (["train", elastic, "--weights", "1"], "train: --weights must be given with --data, got no --data"),
        (
            ["train", elastic, *mixed[:-1], "1,2,3"],
            "train: --weights must be one number for each of the 2 --data, got 3",
        ),
        (
            ["train", elastic, *mixed[:-1], "1,-1", *steps],
            "Mixture: weights must be positive numbers, got 1, -1",
        ),
        (["train", elastic, "--data", tokens, "--field", "x", *steps], "text: field must be given for text"),
        (
            ["train", elastic, "--data", "parent:300", "--field", "x", *steps],
            "text: field must be given for text with fields, got 'x' for parent:300",
        ),
        (["tokenize", text, tokens, "--model", elastic], "got other values of share; --restart"),
        (["tokenize", text, tmp_path / "new", "--model", tmp_path / "no"], "no: must be a directory"),
    ):
        assert says in complaint(capsys, *argv)
    assert answer(capsys, "info", tokens)["documents"] == 60
    (tokens / "tokens.json").write_text("{}")
    assert "tokens.json: format must be there" in complaint(
        capsys, "train", elastic, "--data", tokens, *steps
    )


def test_less_text_than_was_asked_for_is_said(elastic, text, tmp_path):
    tokenizer = read_tokenizer(elastic)
    with pytest.warns(
        UserWarning, match=r"the text has \d+ sequences of 32 tokens where 999 of 32 were asked for"
    ):
        held_out_windows(tokenizer, text, 999, 32)
    with pytest.warns(
        UserWarning, match=r"the text has 1 sequences of \d+ tokens where 2 of 99999 were asked for"
    ):
        held_out_windows(tokenizer, text, 2, 99999)


def test_info_says_what_the_machine_is(capsys):
    facts = answer(capsys, "info", "--machine")
    assert facts["threads"] >= 1 and facts["reads"].endswith(" GB/s")
    assert set(facts["GEMMs of plain weights"]) == {"float32", "bfloat16", "float16"}
    assert facts["GEMMs of plain weights"]["float32"]["up to 8 rows:"] == "own, not measured"
    assert main(["info", "--machine"]) == 0
    assert "not measured: FLEXTRON_CACHE is empty" in capsys.readouterr().out
    for argv, got in (((), "neither"), (("elastic", "--machine"), "both")):
        assert f"either a directory or --machine must be given, got {got}" in complaint(capsys, "info", *argv)


def test_the_version_says_what_is_installed_and_what_the_ops_were_built_for(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    first, second = capsys.readouterr().out.splitlines()
    info = build_info()
    assert first.startswith(f"flextron {info['version']}, torch {torch.__version__}, Python 3.")
    built, cuda = ", ".join(info["isas"]), ", ".join(info["cuda_archs"]) or "none"
    found = re.match(rf"ops: CPU {built} \(here (\w+)\), CUDA {cuda}, compiler ", second)
    assert found.group(1) in {*info["isas"], "generic"}


def test_every_command_has_help_with_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    commands = [name for name in listed if name.isalpha()]
    assert set(COMMANDS) <= set(commands)
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert f"example: flextron {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fact, shown",
    [
        ({"float32": 2, "bfloat16": 27}, "2 × float32, 27 × bfloat16"),
        ({"prefill": "1.0 .. 2.0 ms"}, "prefill 1.0 .. 2.0 ms"),
        (
            {"a-cpu": {"prefill": "1 ms", "decode": "2 ms"}, "a-gpu": {}},
            "a-cpu:\nprefill 1 ms\ndecode 2 ms\na-gpu:\n",
        ),
        ([2.0616579e-06, 0.0], "2.1e-06, 0.0e+00"),
        ([384, 768], "384, 768"),
        ({}, "none"),
        (None, "not known"),
        (135, "135"),
    ],
)
def test_a_fact_is_shown_to_be_read(fact, shown):
    assert as_read(fact) == shown


def test_a_plan_on_paper_is_said_of_a_shape_and_of_a_checkpoint(elastic, capsys):
    plans = answer(capsys, "scale", "--shape", "8b", "--gpus", "1,64")["plans"]
    assert [plan["fits"] for plan in plans] == [False, True] and "torchrun --nnodes 8 " in plans[1]["command"]
    (own,) = answer(capsys, "scale", elastic, "--gpus", 1)["plans"]
    assert own["fits"] and own["memory"]["total"] < 1e8
    assert own["command"] == f"flextron train {elastic} --batch-size 1 --length 256"  # its positions
    assert main(["scale", "--shape", "70b", "--gpus", "1,64"]) == 0
    assert "1 GPU: nothing fits" in capsys.readouterr().out
    assert "either SOURCE or --shape must be given, got both" in complaint(
        capsys, "scale", elastic, "--shape", "1b"
    )
    assert "nowhere: must be a directory, or a hub id" in complaint(capsys, "scale", "nowhere")
    assert "must hold a model, got no config.json" in complaint(capsys, "scale", elastic / "..")
    said = complaint(capsys, "scale", elastic, "--length", 257)
    assert said == "flextron: scale: --length must be at most the 256 positions of the model, got 257\n"
    assert "or a multiple of it, got 12" in complaint(capsys, "scale", "--shape", "1b", "--gpus", "8,12")
