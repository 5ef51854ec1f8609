"""Sparse matrix products by cuSPARSELt. Explained in `06_infer_and_benchmark.ipynb`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.inference.kernels import Gemm


def search_algorithm(
    compressed: Tensor,
    columns: Tensor,
    bias: Tensor | None = None,
    output: torch.dtype | None = None,
) -> dict[str, int]:
    """Return the arguments with which `torch._cslt_sparse_mm` is the fastest for a product.

    Args:
        compressed: the sparse matrix, as `torch._cslt_compress` returns it.
        columns: what it is multiplied by.
        bias: one number for each row of the sparse matrix.
        output: type of the product, where it is not that of the matrices.
    """
    found = torch._C._cusparselt.mm_search(compressed, columns, bias, None, output, True)
    # A fourth number comes last: how many kernels there were to choose from.
    return dict(zip(("alg_id", "split_k", "split_k_mode"), found, strict=False))


class SparseGemm(Gemm):
    """The product with the compressed 2:4 weight, by cuSPARSELt, in FP16 or BF16.

    Source: `torch.sparse.semi_structured`, for layouts and limits of the shapes.
    """

    name = "sparse GEMM"
    STEP = 8  # cuSPARSELt takes rows in multiples of eight

    def __init__(self, layer: nn.Linear | nn.Conv2d, relu: bool) -> None:
        super().__init__(layer, relu)
        self.compressed = torch._cslt_compress(self.weight.contiguous())

    def _rows(self, pixels: Tensor) -> Tensor:
        # PyTorch's binding tells row-major from column-major, and ignores any other strides.
        return super()._rows(pixels).contiguous()

    def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
        # cuSPARSELt has the sparse matrix on the left: y^T = W x^T, written transposed.
        product = torch._cslt_sparse_mm(
            self.compressed,
            self._padded(rows).t(),
            bias=self.bias,
            transpose_result=True,
            **algorithm,
        )[: len(rows)]
        # It could fuse the ReLU as well, but PyTorch's binding has no argument for it.
        return product.relu_() if self.relu else product

    def search(self, input: Tensor) -> dict[str, int]:
        rows = self._padded(self._rows(self._channels_last(input)))
        return search_algorithm(self.compressed, rows.t(), self.bias)

    def _padded(self, rows: Tensor) -> Tensor:
        missing = -len(rows) % self.STEP
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows


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
