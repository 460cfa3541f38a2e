"""Which dtypes are used where, on CPUs with and without 16-bit units."""

import pytest
import torch

from distill.models.precision import product_dtype, teacher_dtype
from distill.preflight.checks import precision_findings

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(params=[True, False], ids=["units", "no units"])
def units(request, monkeypatch):
    monkeypatch.setattr("distill.models.precision.has_units", lambda dtype: request.param)
    return request.param


def test_products_are_widened_only_where_a_cpu_has_no_units(units):
    for dtype in (BF16, FP16):
        assert product_dtype(dtype, "cpu") == (dtype if units else FP32)
        assert product_dtype(dtype, "cuda") == dtype
    assert product_dtype(FP32, "cpu") == FP32
    assert product_dtype(FP64, "cpu") == FP64


@pytest.mark.parametrize(
    ("option", "precision", "expected"),
    [
        ("auto", "32-true", FP32), ("auto", "64-true", FP64), ("auto", "bf16-mixed", None), ("auto", "16-mixed", None),
        ("auto", "bf16-true", None), ("bfloat16", "32-true", BF16), ("float32", "bf16-mixed", FP32),
    ],
)  # fmt: skip
def test_a_frozen_teachers_dtype(option, precision, expected, units):
    assert teacher_dtype(option, precision, "cuda") == (expected or BF16)
    assert teacher_dtype(option, precision, "cpu") == (expected or (BF16 if units else FP32))


def test_a_precision_without_units_is_named(units):
    assert precision_findings("32-true", "cpu") == precision_findings("bf16-mixed", "cuda") == []
    for precision in ("bf16-mixed", "bf16-true", "16-mixed"):
        found = precision_findings(precision, "cpu")
        assert bool(found) != units
        assert all(f"trainer.precision: {precision}" in sentence and "32-true" in sentence for sentence in found)
