"""bench_losses.py judges every format on the same text, and does not judge again what it has written down."""

import json

import pytest
import torch
from nn.models import small_model
from test_bench_model import loaded

import flextron
from flextron.config import Widths


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """A call of the script on a small model, its tokens, and what it wrote."""
    script = loaded("bench_losses")
    ids, made = torch.randint(0, 61, (4, 16)), []

    def model(*_, **__):
        made.append(flextron.make_elastic(small_model(), flextron.elastic_config(small_model().config)))
        return made[-1]

    monkeypatch.setattr(script.flextron, "from_pretrained", model)
    monkeypatch.setattr(script, "read_tokenizer", lambda _: None)
    monkeypatch.setattr(script, "read_documents", lambda path: path)
    monkeypatch.setattr(
        script, "encode", lambda path, *_: ids.flatten() if path == "judge" else torch.arange(6000) % 61
    )
    out = tmp_path / "rows.jsonl"

    def call(*more):
        argv = ["dir", "--judge", "judge", "--fit", "fit", "--samples", "4", "--length", "16", "--types", ""]
        monkeypatch.setattr("sys.argv", ["bench_losses.py", *argv, "--out", str(out), *more])
        made.clear()
        script.main()
        return [json.loads(line) for line in out.read_text().splitlines()], len(made)

    return call, ids


def test_a_loss_is_that_of_the_network_that_a_row_names(judged, capsys):
    call, ids = judged
    model = flextron.make_elastic(small_model(), flextron.elastic_config(small_model().config))
    some, most = model.elastic.mlp_choices[-2:]
    rows, _ = call("--neurons", f"{most},{some}")
    assert len(rows) == 10 and all(row["bytes"] > 0 for row in rows)
    found = {(row["who"], row["neurons"]): row["loss"] for row in rows}
    with torch.no_grad():
        for n in (some, most):
            model.set_widths(
                Widths((n,) * model.elastic.num_layers, (model.elastic.max_heads,) * model.elastic.num_layers)
            )
            own = model(ids, labels=ids).loss.item()
            assert found["flextron, plain", n] == pytest.approx(own, rel=1e-5)
            others = [found[f"flextron, {name}", n] for name in ("int8", "int4", "int4+fit")]
            assert all(0 < abs(other - own) < 0.2 for other in others) and len({*others}) == 3
    assert "over plain" in capsys.readouterr().out


def test_what_is_written_down_is_not_judged_again(judged):
    call, _ = judged
    rows, _ = call("--formats", "plain,int4")
    again, made = call("--formats", "plain,int4,int8")
    assert again[:2] == rows and len(again) == 3 and made == 2  # the one that is exported, and int8's
