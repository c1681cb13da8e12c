"""A CPU's dot products of bfloat16 pairs (AVX512-BF16): their sums, bit for bit, on the processor or emulated."""

from instruction_sets import run_python

# Each feature's last pair of weights takes the sum's upper 16 bits away, so that a bfloat16 result shows the rest.
SUMS = """
import numpy as np, torch
from flextron_ext import pack_linear, packed_linear

def flushed(x):
    x = x.astype(np.float32)
    return np.where(np.abs(x) < 2.0**-126, np.float32(0), x)

def sums(x, weight):
    total = np.zeros(len(weight), np.float32)
    x, weight = flushed(x), flushed(weight)
    for pair in range(0, weight.shape[1], 2):
        for k in (pair + 1, pair):
            if k < weight.shape[1]:  # in float64 a product is exact, as is its sum with a float of like size
                total = flushed(x[k].astype(np.float64) * weight[:, k] + total)
    return total

def cut(x):
    return (x.view(np.uint32) & 0xFFFF0000).view(np.float32)

def product(x, weight, rows):
    x, weight = torch.from_numpy(x).bfloat16(), torch.from_numpy(weight).bfloat16()
    y = packed_linear(x.expand(rows, -1), *pack_linear(weight), None, weight.shape[1], len(weight))
    assert torch.equal(y, y[:1].expand_as(y))
    return y[0].float().numpy()

draw = np.random.default_rng(5)
for inputs in (2, 32, 62, 602):
    x, weight = (cut(draw.standard_normal(shape, np.float32)) for shape in ((inputs,), (80, inputs)))
    total = sums(x, weight)
    high = cut(total)
    middle = cut(total - high)
    shows = np.concatenate([weight, -middle[:, None], -high[:, None]], 1)
    for rows in (1, 3, 40):
        shown = product(np.append(x, np.ones(2, np.float32)), shows, rows)
        assert np.array_equal(shown, total - high - middle) and shown.any()

small = np.float32(2.0**-130)  # below the smallest normal number: 0, as an input and as a result
x = np.array([small, 1, 2.0**-70, 2.0**-70, 1, 1], np.float32)
for weight in ([2.0**100, 0, 0, 0, 0, 0], [0, small, 0, 0, 0, 0], [0, 0, 2.0**-57, 0, 0, 0],
               [0, 0, 2.0**-57, 2.0**-57, 0, 0], [0, 0, 2.0**-56, 0, 0, 0], [0, 0, 0, 0, 2.0**-126, -(2.0**-125)]):
    weight = np.array([weight], np.float32)
    assert np.array_equal(product(x, weight, 1), sums(x, weight)), weight
print("right")
"""


def test_sums_are_those_of_the_instruction(processes):
    result = run_python(processes, "avx512_bf16", SUMS)
    assert result.out.strip() == "right", result.err


# Up to 32 rows of a plain weight: tiles of 1 to 6 rows, of 4 or 8 features, whose last ones are cut.
PLAIN = """
import os, torch
os.environ["FLEXTRON_KERNEL"] = "tile"
from flextron_ext import elastic_linear

torch.manual_seed(0)
K, N, k, n = 620, 50, 533, 37
x, weight = torch.randn(32, K).bfloat16(), torch.randn(N, K).bfloat16()
x[:, k:], weight[:, k:], weight[n:] = torch.nan, torch.nan, torch.nan
product = lambda x, **extents: elastic_linear(x, weight, None, k, n, **extents)
y = product(x[:, :k])
exact = x[:, :k].double() @ weight[:n, :k].double().T
assert (y - exact).norm() <= 2 * (torch.nn.functional.linear(x[:, :k], weight[:n, :k]) - exact).norm()
# What is left of sums that cancel is rounding, which another order of the products shows.
x[:, 266:532], weight[:, 266:532] = x[:, :266], -weight[:, :266]
x[:, 532] = 0
y = product(x[:, :k])
assert y.any() and y.abs().max() < 1e-3
for rows in (1, 2, 3, 4, 5, 6, 7, 8, 17, 31):
    assert torch.equal(product(x[-rows:, :k]), y[-rows:]), rows
extents = torch.randint(0, k + 1, (32,))
mixed = product(x[:, :k], in_extent=extents)
for t in range(32):
    assert torch.equal(product(x[t : t + 1, :k], in_extent=extents[t : t + 1]), mixed[t : t + 1]), t
assert torch.equal(product(x[:, :k], in_extent=torch.full((32,), k)), y)
print("right")
"""


def test_few_rows_of_a_plain_weight_have_the_same_bits_in_any_batch(processes):
    result = run_python(processes, "avx512_bf16", PLAIN)
    assert result.out.strip() == "right", result.err
