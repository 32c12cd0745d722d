"""Few rows of Pallas Mosaic GPU's quantized matmul, as a layer that decodes has them (pallas_mosaic_gpu_few.py)."""

from pallas_kernels.decode_layer.rows import Rows
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu_few as few
from pallas_kernels.quantized_matmul.array import QuantizedArray

unfit_parts, unfit_gate, unfit_add = few.unfit_normed, few.unfit_gate, few.unfit_add


def matmul_parts(rows: Rows, w: QuantizedArray, eps: float):
    return few.matmul_few_parts(rows.scaled, w, rows.scaled.dtype, norm=few.Norm(rows.squares, eps))


def matmul_gate(rows: Rows, w: QuantizedArray, eps: float):
    return few.matmul_few_gate(rows.scaled, w, norm=few.Norm(rows.squares, eps))


def matmul_add(h, w: QuantizedArray, x, scale, offset: float):
    x, scaled, squares = few.matmul_few_add(h, w, few.Add(x, scale, offset))
    return x, Rows(scaled, squares)
