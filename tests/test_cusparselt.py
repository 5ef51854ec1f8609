import pytest
import torch
from inference_cases import fill_free_memory_with_nan, random
from torch import nn

from helpers.inference.cusparselt import SparseGemm, why_no_sparse_gemms
from helpers.inference.kernels import Epilogue
from helpers.metrics import max_relative_error
from helpers.sparsity import prune_2to4_

needs_cusparselt = pytest.mark.skipif(
    bool(why_no_sparse_gemms()), reason=why_no_sparse_gemms() or "it is here"
)


@pytest.mark.skipif(
    not torch.backends.cusparselt.is_available(), reason="PyTorch was built without cuSPARSELt"
)
def test_pytorch_has_the_search_that_is_used():
    taken, returned = torch._C._cusparselt.mm_search.__doc__.split("->")
    assert taken.count("arg") == 6
    assert "tuple[int, int, int, int]" in returned.lower()


def test_pytorch_has_the_operators_with_the_arguments_that_are_used():
    arguments = torch.ops.aten._cslt_sparse_mm.default._schema.arguments
    used = ["bias", "transpose_result", "alg_id", "split_k", "split_k_mode"]
    assert [argument.name for argument in arguments[:2]] == ["compressed_A", "dense_B"]
    assert set(used) <= {argument.name for argument in arguments}
    assert len(torch.ops.aten._cslt_compress.default._schema.arguments) == 1


@pytest.mark.gpu
@needs_cusparselt
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_a_sparse_gemm_is_the_dense_one_on_the_gpu(rows):
    torch.manual_seed(0)
    layer = nn.Linear(64, 128)
    prune_2to4_(layer)
    layer = layer.to("cuda", torch.float16)
    kernel = SparseGemm(layer, Epilogue("ReLU"))
    x = random(rows, 64).to("cuda", torch.float16)
    fill_free_memory_with_nan()
    with torch.inference_mode():
        for algorithm in ({}, kernel.search(x)):
            assert max_relative_error(kernel(x, **algorithm), layer(x).relu()) < 1e-2
