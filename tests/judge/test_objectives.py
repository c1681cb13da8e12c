"""Promises of the losses: torch's values and gradients, at any chunking and dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flextron.judge import objectives
from flextron.judge.objectives import cross_entropy, distillation, imitation, next_token, weighted

SHAPES = [(1, 2, 3), (2, 5, 7), (3, 4, 33)]


@pytest.fixture(params=[1, 20, 1 << 23], ids=["row", "few", "all"])
def chunk(request, monkeypatch):
    """Run with one row in a chunk, a few (and a short last chunk), and all at once."""
    monkeypatch.setattr(objectives, "_CHUNK_VALUES", request.param)


def gradient_of(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_is_the_shifted_one_of_torch(shape, chunk):
    B, T, V = shape
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (B, T))
    ours = cross_entropy(logits, labels)
    theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient_of(3 * ours, logits), gradient_of(3 * theirs, logits))


def test_cross_entropy_leaves_out_label_minus_100(chunk):
    logits = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (2, 6))
    labels[0, 3:], labels[1, 0] = -100, -100
    ours = cross_entropy(logits, labels)
    theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(ours, theirs)
    gradient = gradient_of(ours, logits)
    torch.testing.assert_close(gradient, gradient_of(theirs, logits))
    assert not gradient[0, 2:].any()
    assert not gradient[:, -1].any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_distillation_is_the_kl_divergence_of_torch(shape, temperature, chunk):
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.float64)
    ours = distillation(student, teacher, temperature)
    log_q = (student / temperature).log_softmax(-1).flatten(0, 1)
    p = (teacher / temperature).softmax(-1).flatten(0, 1)
    theirs = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient_of(3 * ours, student), gradient_of(3 * theirs, student))


def test_gradients_are_those_of_finite_differences():
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher, labels = torch.randn_like(logits), torch.randint(5, (2, 4))
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, labels), logits)
    assert torch.autograd.gradcheck(lambda z: distillation(z, teacher, 2.0), logits)


def test_distillation_from_oneself_is_zero_and_teaches_nothing_to_the_teacher():
    student = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    loss = distillation(student, student.detach().clone())
    assert abs(loss.item()) < 1e-15
    assert gradient_of(loss, student).abs().max() < 1e-16
    teacher = torch.randn(2, 3, 9, requires_grad=True)
    distillation(torch.randn(2, 3, 9, requires_grad=True), teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype, chunk):
    logits = torch.randn(2, 8, 40, dtype=dtype, requires_grad=True)
    labels, teacher = torch.randint(40, (2, 8)), torch.randn(2, 8, 40, dtype=dtype)
    exact = logits.detach().double().requires_grad_()
    pairs = [
        (cross_entropy(logits, labels), cross_entropy(exact, labels)),
        (distillation(logits, teacher), distillation(exact, teacher.double())),
    ]
    for ours, wanted in pairs:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=0)
        got = gradient_of(ours, logits)
        assert got.dtype == dtype
        # one rounding of the result to the dtype of the logits
        bound = torch.finfo(dtype)
        torch.testing.assert_close(got.double(), gradient_of(wanted, exact), rtol=bound.eps, atol=bound.tiny)


def test_large_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4, 0.0]] * 3], requires_grad=True)
    for loss in (
        cross_entropy(logits, torch.tensor([[1, 1, 0]])),
        distillation(logits, logits.detach().flip(-1)),
    ):
        assert loss.isfinite()
        assert gradient_of(loss, logits).isfinite().all()


class Allocations(TorchDispatchMode):
    """Elements of every tensor that is made while the mode is on, by its storage."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []  # so that no storage is used twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in [out] if isinstance(out, torch.Tensor) else []:
            self.alive.append(tensor)
            storage = tensor.untyped_storage()
            self.sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return out


@pytest.mark.parametrize("wanted", [True, False])
def test_chunks_keep_the_memory_small(wanted, monkeypatch):
    """Nothing of the logits' size is made but their gradient, and that only when it is wanted."""
    monkeypatch.setattr(objectives, "_CHUNK_VALUES", 64)
    logits, labels = torch.randn(4, 16, 32, requires_grad=wanted), torch.randint(32, (4, 16))
    teacher = torch.randn_like(logits)
    for loss in (lambda: cross_entropy(logits, labels), lambda: distillation(logits, teacher)):
        with Allocations() as made:
            loss()
        sizes = [
            size for place, size in made.sizes.items() if place not in (logits.data_ptr(), teacher.data_ptr())
        ]
        assert sizes.count(logits.numel()) == wanted
        assert max(size for size in sizes if size != logits.numel()) <= 64


def test_no_gradient_is_made_when_none_is_wanted():
    logits = torch.randn(2, 3, 5)
    assert not cross_entropy(logits, torch.zeros(2, 3, dtype=torch.int64)).requires_grad
    assert not distillation(logits, logits).requires_grad


def test_bad_arguments_are_named():
    logits = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"labels must have shape \[B, T\].*got \[2, 4\] and \[2, 3, 5\]"):
        cross_entropy(logits, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"teacher_logits must have the shape .* \[2, 3, 5\], got \[2, 3, 6\]"
    ):
        distillation(logits, torch.randn(2, 3, 6))
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        distillation(logits, logits, 0)


def through_head(N=11, V=13, K=5, bias=True, dtype=torch.float64):
    x = torch.randn(1, N, K, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(K, V, bias=bias, dtype=dtype)
    labels, teacher = torch.randint(V, (1, N)), torch.randn(1, N, V, dtype=dtype)
    return x, head, [(0.7, next_token(labels)), (1.3, imitation(teacher, 2.0))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pieces", [1, 4], ids=["one", "several"])
def test_a_head_gets_the_gradients_of_its_logits(pieces, bias, chunk, monkeypatch):
    x, head, terms = through_head(bias=bias)
    monkeypatch.setattr(objectives, "_HEAD_VALUES", 13 * 11 // pieces)
    leaves = [x, *head.parameters()]
    ours, values = weighted(x, head, terms)
    wanted, theirs = weighted(head(x), None, terms)
    torch.testing.assert_close([ours, *values], [wanted, *theirs])
    torch.testing.assert_close(0.7 * values[0] + 1.3 * values[1], ours.detach())
    for scale in (1, 3):
        got = torch.autograd.grad(scale * ours, leaves, retain_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(scale * wanted, leaves, retain_graph=True))


def test_gradients_of_a_head_are_those_of_finite_differences():
    x, head, terms = through_head(N=4, V=6)

    def loss(x, weight, bias):
        head.weight, head.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        object.__setattr__(head, "_parameters", dict(weight=weight, bias=bias))
        return weighted(x, head, terms)[0]

    weight, bias = (p.detach().clone().requires_grad_() for p in head.parameters())
    assert torch.autograd.gradcheck(loss, (x, weight, bias))


def test_a_head_computes_in_autocasts_dtype_and_its_gradients_stay_float32():
    x, head, terms = through_head(N=64, V=96, K=32, dtype=torch.float32)
    exact = weighted(x.double(), head.double(), terms)[0]
    wanted = torch.autograd.grad(exact, [x])[0]
    head.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours = weighted(x, head, terms)[0]
    got, weight = torch.autograd.grad(ours, [x, head.weight])
    assert ours.dtype == got.dtype == weight.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=0)
    assert 0 < (got - wanted).norm() < 1e-2 * wanted.norm()


def test_logits_of_all_tokens_are_never_there(monkeypatch):
    """With a head nothing is made that is larger than a piece, the gradients and what they are made from."""
    N, V, K = 64, 96, 4
    x, head, terms = through_head(N, V, K, dtype=torch.float32)
    monkeypatch.setattr(objectives, "_HEAD_VALUES", 8 * V)
    monkeypatch.setattr(objectives, "_CHUNK_VALUES_CPU", 2 * V)
    with Allocations() as made:
        weighted(x, head, terms[:1])[0].backward()
    assert max(made.sizes.values()) == 8 * V
