"""Documents that a model writes: what a call asks of it, and what ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flextron.sampling import Drawn, sample_documents


class Tokenizer:
    """Two tokens, of which 1 ends a document."""

    bos_token_id, eos_token_id = None, 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0]}

    def decode(self, ids: list[int]) -> str:
        return "a" * len(ids)


def writer(*rows: list[int]) -> SimpleNamespace:
    """A model that writes these rows, whatever it is asked for."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        generate=lambda start, **_: torch.cat([start, torch.tensor(rows)], 1),
    )


def test_what_follows_the_end_of_a_document_is_not_written(tmp_path):
    file = tmp_path / "text.jsonl"
    model = writer([0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0])
    report = sample_documents(model, Tokenizer(), file, tokens=7, length=4, batch_size=3)
    assert report == {"documents": 6, "tokens": 12, "resumed": 0}
    assert file.read_text().count('"text": "aa"') == file.read_text().count('"text": "aaaa"') == 2


def test_a_model_that_writes_nothing_is_refused_and_not_asked_for_ever(tmp_path):
    with pytest.raises(ValueError, match="must write something, got 2 documents of no token"):
        sample_documents(
            writer([1, 1], [1, 1]), Tokenizer(), tmp_path / "text", tokens=5, length=2, batch_size=2
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_as_often_as_the_logits_say(temperature):
    logits = torch.tensor([0.0, -torch.inf, 1.0, -3.0, 2.0, -torch.inf])
    torch.manual_seed(0)
    drawn = Drawn(temperature)(torch.zeros(20_000, 1), logits.expand(20_000, -1)).argmax(-1)
    expected = (logits / temperature).softmax(-1)
    found = drawn.bincount(minlength=6) / 20_000
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((found - expected).abs() <= 4 * error).all()
    assert found[[1, 5]].tolist() == [0, 0]
