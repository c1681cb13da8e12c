"""The table of GPUs: what CUDA calls a device finds its row, and an unknown one finds none."""

import pytest

from flextron.devices import DEVICES, known


@pytest.mark.parametrize(
    "reported, name",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
    ],
)
def test_the_name_that_cuda_reports_finds_its_row(reported, name):
    assert known(reported).name == name


def test_every_row_can_be_found_and_no_other_device_is_taken_for_one():
    assert all(known(" ".join(d.words)) is d for d in DEVICES)
    assert known("NVIDIA GeForce RTX 4090") is None
