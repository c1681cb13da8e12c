"""Which executor computes the GEMMs of elastic_linear and elastic_mlp: a function of numbers, asked without a GPU."""

import pytest

from flextron_ext import _C

BF16, FP32, FP64 = 2, 4, 8  # bytes of an element


def on_cpu(*arguments, **options):
    return _C.executor(False, *arguments, **options)


def on_gpu(*arguments, **options):
    return _C.executor(True, *arguments, **options)


def test_a_cpu_takes_its_own_gemm_where_that_is_preferred():
    assert on_cpu(1, FP32, own_preferred=True) == "panels"
    assert on_cpu(1, FP32) == "views"


@pytest.mark.parametrize("asked", ["", "tile", "vendor", "decode"])
def test_weights_that_its_own_gemm_cannot_read_are_views(asked):
    assert on_cpu(1, BF16, fits_panels=False, asked=asked, own_preferred=True) == "views"
    assert on_cpu(1, FP64, fits_panels=False, asked=asked, own_preferred=True) == "views"


def test_a_cpu_does_what_is_asked():
    assert on_cpu(4096, FP32, asked="tile") == "panels"
    assert on_cpu(1, BF16, asked="vendor", own_preferred=True) == "views"
    assert on_cpu(1, BF16, asked="decode", own_preferred=True) == "panels"


def test_a_gradient_of_a_weight_has_its_own_choice():
    assert on_cpu(64, BF16, weight_gradient=True) == "panels"
    assert on_cpu(64, FP32, weight_gradient=True) == "views"
    assert on_cpu(64, FP32, asked="tile", weight_gradient=True) == "panels"


def test_a_gpu_streams_16_bit_weights_past_few_tokens():
    assert [on_gpu(T, BF16) for T in (1, 32, 33, 64)] == ["stream", "stream", "tile", "tile"]
    assert [on_gpu(T, BF16, True) for T in (1, 64, 65)] == ["stream", "stream", "tile"]
    assert on_gpu(1, FP32) == on_gpu(1, FP64) == "tile"


def test_a_gpu_does_what_is_asked_where_it_can():
    assert on_gpu(1, BF16, asked="tile") == "tile"
    assert [on_gpu(T, BF16, asked="decode") for T in (64, 65)] == ["stream", "tile"]
    assert on_gpu(1, FP32, asked="decode") == "tile"
    assert on_gpu(4096, BF16, asked="vendor") == "views"
    assert on_gpu(4096, BF16, True, asked="vendor") == "tile"  # the host does not know the extents


def test_a_gpu_never_takes_what_is_a_cpu_s():
    every = [
        on_gpu(T, size, device, fits, asked, own_preferred=own)
        for own in (False, True)
        for T in (1, 33, 4096)
        for size in (BF16, FP32)
        for device in (False, True)
        for fits in (False, True)
        for asked in ("", "tile", "vendor", "decode")
    ]
    assert "panels" not in every
