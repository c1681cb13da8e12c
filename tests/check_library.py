"""Every op of the library at argv[1] against plain torch, forward and backward, without any Python of ours."""

import sys

import torch
import torch.nn.functional as F

torch.ops.load_library(sys.argv[1])
ops = torch.ops.flextron
torch.manual_seed(0)
done = []


def check(name, got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    done.append(name)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


# q [T, H, D], k and v [S, G, D]; row t sees the `window` keys up to first_key + t, and its head's sink.
def attention(q, k, v, first_key, window=99, softcap=1e4, sinks=None):
    repeat = q.shape[1] // k.shape[1]
    q, k, v = q.transpose(0, 1), *(x.repeat_interleave(repeat, 1).transpose(0, 1) for x in (k, v))
    before = first_key + torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    scores = torch.tanh(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 / softcap) * softcap
    scores = scores.masked_fill((before < 0) | (before >= window), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:2], 1)), -1)
    return (scores.softmax(-1)[..., : k.shape[1]] @ v).transpose(0, 1), scores.logsumexp(-1).T


# A projection: 6 of 8 inputs and 10 of 12 outputs used, once by a number and once by a count per token.
x, w, b = leaf(5, 8), leaf(12, 8), leaf(12)
y = F.linear(x[:, :6], w[:10, :6], b[:10])
dy = torch.randn_like(y)
sizes = (6, 10, None, None, 1, 1)
with torch.no_grad():
    check("elastic_linear", [ops.elastic_linear(x, w, b, *sizes)], [y])
    grads = torch.autograd.grad(y, (x, w, b), dy)
    check("elastic_linear_backward", ops.elastic_linear_backward(dy, x, w, b, *sizes, 7), grads)
    extent = torch.tensor([0, 10, 3, 7, 1])
    kept = torch.arange(10) < extent[:, None]
    check("elastic_linear", [ops.elastic_linear(x, w, b, 6, 10, None, extent, 1, 1)], [y * kept])

# A SwiGLU MLP at 9 of 16 neurons, then with a count per token.
x, gate, up, down = leaf(5, 8), leaf(16, 8), leaf(16, 8), leaf(8, 16)
extent = torch.tensor([9, 0, 4, 9, 1])
for counts, kept in ((None, torch.ones(5, 9)), (extent, torch.arange(9) < extent[:, None])):
    h = F.silu(x @ gate[:9].T) * (x @ up[:9].T) * kept
    y = h @ down[:, :9].T
    dy = torch.randn_like(y)
    arguments = (x, gate, up, down, None, None, None, 9, "silu", counts, None, None)
    with torch.no_grad():
        check("elastic_mlp", [ops.elastic_mlp(*arguments)], [y])
        grads = torch.autograd.grad(y, (x, gate, up, down), dy)
        out, *hidden = ops.elastic_mlp_with_hidden(*arguments)
        check("elastic_mlp_with_hidden", [out], [y])
        check("elastic_mlp_backward", ops.elastic_mlp_backward(dy, *arguments, *hidden, 15)[:4], grads)

# Attention with 2 of 3 groups (two query heads each): 5 queries at the end of 7 keys.
q, k, v, sinks = leaf(5, 6, 4), leaf(7, 3, 4), leaf(7, 3, 4), leaf(6)
y, lse = attention(q[:, :4], k[:, :2], v[:, :2], 2, 4, 1.5, sinks[:4])
dy = torch.randn(5, 6, 4)
arguments = (2, "kv_group", None, "sequence", None, None, None, None, True, None, 4, 1.5, sinks)
with torch.no_grad():
    out, out_lse = ops.head_attention(q, k, v, *arguments)
    check("head_attention", [out[:, :4], out[:, 4:], out_lse[:, :4]], [y, torch.zeros(5, 2, 4), lse])
    grads = torch.autograd.grad(y, (q, k, v, sinks), dy[:, :4])
    check(
        "head_attention_backward",
        ops.head_attention_backward(dy, q, k, v, out, out_lse, *arguments, 15),
        grads,
    )

# One new token for each of two sequences, with 7 and 4 keys in a cache of 8.
q, k, v, lengths = leaf(2, 1, 6, 4), leaf(2, 8, 3, 4), leaf(2, 8, 3, 4), torch.tensor([7, 4])
y = torch.stack(
    [
        attention(q[i, :, :4], k[i, :n, :2], v[i, :n, :2], n - 1, 5, 1.5, sinks[:4])[0]
        for i, n in enumerate(lengths.tolist())
    ]
)
dy = torch.randn(2, 1, 6, 4)
arguments = (q, k, v, lengths, 2, "kv_group", None, None, None, None, 5, 1.5, sinks)
with torch.no_grad():
    out = ops.head_attention_decode(*arguments)
    check("head_attention_decode", [out[:, :, :4], out[:, :, 4:]], [y, torch.zeros(2, 1, 2, 4)])
    grads = torch.autograd.grad(y, (q, k, v, sinks), dy[:, :, :4])
    check("head_attention_decode_backward", ops.head_attention_decode_backward(dy, *arguments, 15), grads)


def panels(w):  # [N, K] -> [1, N / 16, K, 16, 1], the last panel filled up
    return F.pad(w, (0, 0, 0, -w.shape[0] % 16)).view(1, -1, 16, w.shape[1], 1).transpose(2, 3).contiguous()


def norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


x, w, gate, up, down = (torch.randn(*s) for s in ((5, 8), (20, 8), (16, 8), (16, 8), (8, 16)))
check(
    "packed_linear",
    [ops.packed_linear(x, panels(w), None, "float32", None, 6, 18)],
    [x[:, :6] @ w[:18, :6].T],
)
both = torch.stack((panels(gate), panels(up)), 2).flatten(1, 2)
y = (F.silu(x @ gate[:9].T) * (x @ up[:9].T)) @ down[:, :9].T
check("packed_mlp", [ops.packed_mlp(x, both, panels(down), None, None, "float32", *[None] * 3, 9, 8)], [y])

# A token behind three, through one layer of two heads of four, and 9 of 16 neurons; by numbers, then by a router.
q, k, v, o, head = (torch.randn(*s) for s in ((8, 8), (8, 8), (8, 8), (8, 8), (5, 8)))
x, ones, keys, values = torch.randn(1, 1, 8), torch.ones(8), torch.randn(1, 4, 2, 4), torch.randn(1, 4, 2, 4)
n = norm(x[0])
keys_then, values_then = keys.clone(), values.clone()
keys_then[0, 3], values_then[0, 3] = (n @ k.T).view(2, 4), (n @ v.T).view(2, 4)
seen = attention((n @ q[:4].T).view(1, 1, 4), keys_then[0, :, :1], values_then[0, :, :1], 3)[0]
y = x[0] + seen.view(1, 4) @ o[:, :4].T
y = y + (F.silu(norm(y) @ gate[:9].T) * (norm(y) @ up[:9].T)) @ down[:, :9].T
words = torch.randn(5, 8)
words[3] = x[0, 0]  # the token is number 3
weights, names = (
    [words, ones, head, ones, q, k, v, o, ones, gate, up, down],
    "embedding norm head in_norm q k v o",
)
held = ops.decoder_hold(weights, names + " mlp_norm gate up down", [1, 16, 2, 2, 4], [1e-6, 0.5])
check("decoder_hold", [], [])
base, logits = torch.tensor([[[0.0, 1e6, 1e6, 0.0]]]), norm(y) @ head.T
router = [torch.randn(1, 3, 8), torch.randn(1, 4, 3), torch.zeros(1, 1, 3), base]
for widths, heads, routed in (([9], [1], ()), ([], [], (router, [4, 9], [1, 2]))):
    cache = [keys.clone()], [values.clone()]
    turn = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    got = ops.decoder_step(torch.tensor([[3]]), *turn, held, *cache, 3, widths, heads, [2], 1, None, *routed)
    wanted = [logits, logits.argmax(-1), keys_then, values_then]
    check("decoder_step", [got[0][0], got[1], cache[0][0], cache[1][0]], wanted)
ops.decoder_drop(held)
try:
    ops.decoder_drop(held)
except RuntimeError as error:
    assert "not be dropped" in str(error), error
    check("decoder_drop", [], [])

# The worked example: a gate and a width for each token.
x, gate = leaf(5, 8), leaf(5)
width = torch.tensor([0, 8, 3, 7, 1])
y = gate[:, None] * x * (torch.arange(8) < width[:, None])
dy = torch.randn_like(y)
with torch.no_grad():
    check("prefix_gate", [ops.prefix_gate(x, gate, width)], [y])
    grads = torch.autograd.grad(y, (x, gate), dy)
    check("prefix_gate_backward", ops.prefix_gate_backward(dy, x, gate, width, 3), grads)

logits = torch.randn(9, 4)
choice = logits.argmax(1)
order = torch.argsort(choice, descending=True, stable=True)
offsets = torch.tensor([int((choice > 3 - i).sum()) for i in range(5)])
check("route", ops.route(logits, None), [choice, order, offsets])

there = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("flextron::")}
missing = sorted(there - set(done))
assert not missing, f"no check here for {missing}"
print(f"torch {torch.__version__}: {len(there)} ops loaded and right")
