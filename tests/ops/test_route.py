"""What is peculiar to route: ties, NaN, the stable order, and noise that is a function of the seed alone."""

import pytest
import torch

from flextron_ext import reference, route


def test_buckets_hold_their_choice_in_token_order():
    logits = torch.randn(500, 4)
    choice, order, offsets = route(logits)
    assert offsets[0] == 0 and offsets[-1] == 500
    for i in range(4):
        bucket = order[offsets[i] : offsets[i + 1]]
        assert torch.equal(bucket, (choice == 3 - i).nonzero()[:, 0])


def test_the_first_of_equals_wins():
    assert route(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [-torch.inf] * 3])).choice.tolist() == [
        1,
        0,
        0,
    ]


def test_nan_counts_as_minus_infinity():
    nan = torch.nan
    logits = torch.tensor([[nan, -5.0, nan], [nan, nan, nan], [3.0, nan, 4.0]])
    assert route(logits).choice.tolist() == [1, 0, 2]
    assert route(logits, seed=1).choice[0] == 1


def test_no_tokens_and_one_choice():
    choice, order, offsets = route(torch.empty(0, 3))
    assert choice.shape == order.shape == (0,) and offsets.tolist() == [0, 0, 0, 0]
    assert route(torch.randn(3, 1)).offsets.tolist() == [0, 3]


def test_the_seed_alone_decides_the_noise():
    logits = torch.zeros(400, 3)
    first = route(logits, seed=5).choice
    torch.manual_seed(99)
    assert torch.equal(route(logits, seed=5).choice, first)
    assert not torch.equal(route(logits, seed=6).choice, first)
    assert torch.equal(route(logits[:100], seed=5).choice, first[:100])  # a token's noise ignores the others


def test_the_noise_is_that_of_the_reference():
    logits = torch.randn(200, 5)
    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        assert torch.equal(route(logits, seed).choice, reference.route(logits, seed)[0])


@pytest.mark.parametrize("seed", [0, 1234])
def test_gumbel_frequencies_are_the_softmax(seed):
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    tokens = 40_000
    counts = torch.bincount(route(logits.expand(tokens, 4), seed=seed).choice, minlength=4)
    expected = torch.softmax(logits, 0) * tokens
    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in a thousand seeds


def test_16_bit_logits_are_exact():
    logits = torch.randn(100, 6)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(route(logits.to(dtype)).choice, logits.to(dtype).float().argmax(1))


def test_no_gradient_flows():
    logits = torch.randn(5, 3, requires_grad=True)
    assert not any(out.requires_grad for out in route(logits))
    assert not any(out.requires_grad for out in torch.ops.flextron.route(logits))


BAD = [
    (dict(logits=torch.zeros(3)), ValueError, r"logits must have shape \[T, C\] with C >= 1, got \[3\]"),
    (
        dict(logits=torch.zeros(3, 0)),
        ValueError,
        r"logits must have shape \[T, C\] with C >= 1, got \[3, 0\]",
    ),
    (dict(logits=torch.zeros(3, 2, dtype=torch.int32)), TypeError, "logits must be float32, .*got int32"),
    (dict(logits=torch.zeros(3, 2), seed=2**63), ValueError, "seed must be a 64-bit integer or None, got"),
    (dict(logits=torch.zeros(1, 9000)), RuntimeError, r"logits.size\(1\) must lie in \[1, 8192\], got 9000"),
]


@pytest.mark.parametrize("arguments, error, message", BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_arguments_get_one_sentence(arguments, error, message):
    with pytest.raises(error, match=f"route: {message}"):
        route(**arguments)


@pytest.mark.parametrize("T, C", [(1000, 5), (600, 300)])
def test_more_tokens_and_choices_than_a_thread_block_has_threads(T, C, device):
    logits = torch.randn(T, C, device=device)
    for ours, expected in zip(route(logits), reference.route(logits), strict=True):
        assert torch.equal(ours, expected)
