"""Sparse matrix products by cuSPARSELt. Explained in `06_infer_and_benchmark.ipynb`."""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helpers.errors import first_line
from helpers.inference import cuda_graphs
from helpers.inference.int8 import Int8Gemm
from helpers.inference.kernels import NO_EPILOGUE, Epilogue, Gemm, ProductLayer, pad_rows
from helpers.sparsity import is_2to4

_logger = logging.getLogger(__name__)

# Compute capabilities where some of cuSPARSELt's FP16 algorithms leave CUDA unusable. On an H100,
# versions 0.8.0 and 0.8.1 have 52 of them, and every one from number 36 on ends in an illegal
# instruction (data/reference/cusparselt_algorithms_h100.json; `benchmarks/gpu.py` tries them).
BROKEN_IN_FP16 = {(9, 0)}


def why_no_sparse_gemms() -> str:
    """Return in one sentence why sparse GEMMs cannot run on this machine; empty if they can."""
    if not torch.cuda.is_available():
        return "No NVIDIA GPU was found, so cuSPARSELt's sparse matrix products cannot run here."
    if torch.cuda.get_device_capability() < (8, 0):
        return (
            f"{torch.cuda.get_device_name()} has no Sparse Tensor Cores, which came with compute "
            "capability 8.0."
        )
    if not torch.backends.cusparselt.is_available():
        return (
            f"PyTorch {torch.__version__} was built without cuSPARSELt; install the CUDA build "
            "from pytorch.org."
        )
    return ""


def search_algorithm(
    compressed: Tensor,
    columns: Tensor,
    bias: Tensor | None = None,
    output: torch.dtype | None = None,
    factors: Tensor | None = None,
) -> dict[str, int]:
    """Return the arguments with which `torch._cslt_sparse_mm` is fastest for a product.

    cuSPARSELt executes each of its algorithms for that, so one broken algorithm is enough to
    leave CUDA unusable. Where that is known (`may_search`), nothing is searched, and the default
    algorithm stands. Where PyTorch does not take the way to split k that comes with the fastest
    algorithm, that algorithm is returned without one.

    Args:
        compressed: the sparse matrix, as `torch._cslt_compress` returns it.
        columns: what it is multiplied by.
        bias: one number for each row of the sparse matrix.
        output: type of the product, if it is not that of the matrices.
        factors: one FP32 number for each row of the sparse matrix, which the products of the
            row are multiplied by.

    Raises:
        DeadContextError: an algorithm left CUDA unusable.
        RuntimeError: cuSPARSELt does not take these matrices.
    """
    given: dict[str, Any] = {"bias": bias, "alpha": factors, "out_dtype": output}
    given = {name: value for name, value in given.items() if value is not None}
    product = partial(torch._cslt_sparse_mm, compressed, columns, transpose_result=True, **given)
    if columns.is_cuda and not may_search(columns.dtype, columns.device):
        _logger.info(
            "cuSPARSELt's default algorithm is used: some of its FP16 algorithms leave an H100 "
            "unusable. BF16 is as fast there and can be searched."
        )
        return {}
    search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]  # not in the stubs
    # A fourth number comes last: how many kernels there were to choose from.
    algorithm, split_k, split_k_mode, *_ = search(compressed, columns, bias, factors, output, True)
    found = {"alg_id": algorithm, "split_k": split_k, "split_k_mode": split_k_mode}
    try:
        product(**found)
    except RuntimeError as error:
        cuda_graphs.raise_if_context_is_broken(error, f"cuSPARSELt's product with {found}")
        _logger.info(
            "cuSPARSELt does not run the fastest it found, %s: %s", found, first_line(error)
        )
        return {"alg_id": algorithm}
    return found


def may_search(dtype: torch.dtype, device: torch.device | None = None) -> bool:
    """Return whether cuSPARSELt may try all its algorithms for a type on a GPU.

    Args:
        dtype: of the matrices.
        device: the GPU in use unless given.
    """
    broken = torch.cuda.get_device_capability(device) in BROKEN_IN_FP16
    return not (broken and dtype == torch.float16)


def half_type(device: torch.device | None = None) -> torch.dtype:
    """Return the type of 16 bits in which sparse products run best on a GPU.

    It is FP16, or BF16 where cuSPARSELt may not search in FP16: its matrix products are as fast.

    Args:
        device: the GPU in use unless given.
    """
    return torch.float16 if may_search(torch.float16, device) else torch.bfloat16


class SparseGemm(Gemm):
    """The product with the compressed 2:4 weight, by cuSPARSELt, in FP16 or BF16.

    Source: `torch.sparse.semi_structured`, for layouts and limits of the shapes.
    """

    name = "sparse GEMM"
    STEP = 8  # cuSPARSELt takes rows in multiples of eight

    def __init__(self, layer: ProductLayer, epilogue: Epilogue = NO_EPILOGUE) -> None:
        super().__init__(layer, epilogue)
        self.compressed = torch._cslt_compress(self.weight.contiguous())

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        return super().takes(layer) and is_2to4(layer.weight)

    def as_rows(self, pixels: Tensor) -> Tensor:
        # PyTorch's binding distinguishes row-major from column-major, and ignores other strides.
        return super().as_rows(pixels).contiguous()

    def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
        # cuSPARSELt has the sparse matrix on the left: y^T = W x^T, written transposed.
        product = torch._cslt_sparse_mm(
            self.compressed,
            pad_rows(rows, self.STEP).t(),
            bias=self.bias,
            transpose_result=True,
            **algorithm,  # type: ignore[arg-type]  # mypy tries it for bias and alpha too
        )[: len(rows)]
        # It could fuse the ReLU as well, but PyTorch's binding has no argument for it.
        return self.epilogue.apply_(product)

    def search(self, input: Tensor) -> dict[str, int]:
        rows = pad_rows(self.as_rows(self.channels_last(input)), self.STEP)
        return search_algorithm(self.compressed, rows.t(), self.bias)


class UnsearchedSparseGemm(SparseGemm):
    """The same by cuSPARSELt's default algorithm, where trying all of them breaks CUDA."""

    name = "sparse GEMM, default algorithm"

    def search(self, input: Tensor) -> dict[str, int]:
        return {}


class SparseInt8Gemm(Int8Gemm):
    """The product in INT8 with the compressed 2:4 weight, by cuSPARSELt.

    cuSPARSELt multiplies each sum by its scale before it writes FP16 or BF16. The bias is added
    afterwards: the type that cuSPARSELt reads it in beside INT8 is not documented.
    """

    name = "sparse INT8 GEMM"
    STEP = 16  # cuSPARSELt takes INT8 rows in multiples of sixteen

    def __init__(self, layer: ProductLayer, epilogue: Epilogue = NO_EPILOGUE) -> None:
        super().__init__(layer, epilogue)
        self.compressed = torch._cslt_compress(self.integers.contiguous())

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        return super().takes(layer) and is_2to4(layer.weight)

    def scaled_product(self, rows: Tensor, dtype: torch.dtype, **algorithm: int) -> Tensor:
        return torch._cslt_sparse_mm(
            self.compressed,
            pad_rows(rows, self.STEP).t(),
            alpha=self.factors,
            out_dtype=dtype,
            transpose_result=True,
            **algorithm,  # type: ignore[arg-type]  # mypy tries it for bias and alpha too
        )[: len(rows)]

    def search(self, input: Tensor) -> dict[str, int]:
        rows = pad_rows(self.rounded(self.as_rows(self.channels_last(input))), self.STEP)
        return search_algorithm(self.compressed, rows.t(), output=input.dtype, factors=self.factors)
