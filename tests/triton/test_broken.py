"""The tests of the kernels are themselves tested: a kernel with a planted mistake makes them red."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import test_squeeze
from pixel_cases import compare

SHAPES = ((1, 12, 9, 11), (2, 34, 3, 5))
COLUMN, ROW = "c[:, None] * column", "out[None, :] * row"
MISTAKES = {  # what goes wrong: (module, op, text, replacement)
    "the tail of a block is lost": (
        "couple", "couple", "inside = (p < pixels)[:, None]", "inside = (p < pixels - 1)[:, None]"),
    "half of the log-determinant": (
        "couple", "couple", "logdet + tl.program_id(0), total)", "logdet + tl.program_id(0), total / 2)"),
    "the inverse's sign": ("couple", "couple", "total = -total if INVERSE else total", "total = total"),
    "a shift in place of a scale": ("couple", "couple_vjp", "db = gb * s\n", "db = gb + s\n"),
    "another sample's cotangent": ("couple", "couple_vjp", "tl.load(glogdet + sample)", "tl.load(glogdet)"),
    "channels beyond the first products": (
        "couple_mix", "couple_mix", "range(0, H, DEPTH)", "range(0, DEPTH, DEPTH)"),
    "the offset of the other half": ("couple_mix", "mix_couple", "tl.load(offset + c + H,", "tl.load(offset + c,"),
    "a transposed matrix": (
        "mix", "channel_mix", f"{ROW} + {COLUMN}", f"{ROW} + {COLUMN}".replace("row", "_").replace(
            "column", "row").replace("_", "column")),
    "a program's partial sums are lost": (
        "mix_vjp", "mix_vjp", "mask = (r < programs)[:, None]", "mask = (r < programs - 1)[:, None]"),
    "the derivative of another mix": (
        "mix_vjp", "mix_vjp", "columns(matrix, out, c, column, row, C)", "columns(matrix, out, c, row, column, C)"),
    "rows of a block for its columns": (
        "squeeze", "squeeze_mix", "(c // 2) % 2 * of_block_row", "(c // 2) % 2 * of_block_column"),
    "an unwritten gradient": (
        "pointwise", "data_consistency_vjp", "    tl.store(dy + i, step * b_g, mask=i < size)\n", ""),
}  # fmt: skip


def edited(module: str, old: str, new: str, folder):
    """A copy of a kernel module with one place changed."""
    original = sys.modules[f"flowkern.kernels.{module}"]
    text = open(original.__file__).read()
    assert text.count(old) >= 1, f"{module} no longer holds {old!r}"
    path = folder / f"{module}_edited.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{module}_edited", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def judge(op, function, monkeypatch):
    """The test of that op, on one function."""
    if op == "squeeze_mix":
        monkeypatch.setattr(test_squeeze, "KERNELS", SimpleNamespace(squeeze_mix=function))
        test_squeeze.test_squeeze_mix_is_squeeze_then_mix((2, 3, 6, 10))
    else:
        compare(SimpleNamespace(**{op: function}), op, "fp32", 1.0, SHAPES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, tmp_path, monkeypatch):
    module, op, old, new = MISTAKES[mistake]
    function = getattr(edited(module, old, new, tmp_path), op)
    with pytest.raises(AssertionError):
        judge(op, function, monkeypatch)


@pytest.mark.parametrize("module,op", sorted({(m, op) for m, op, *_ in MISTAKES.values()}))
def test_an_unchanged_copy_passes(module, op, tmp_path, monkeypatch):
    judge(op, getattr(edited(module, "tl.load", "tl.load", tmp_path), op), monkeypatch)
