import pytest
import torch
from inference_cases import fill_free_memory_with_nan, pruned_linear, random
from torch import nn

from helpers.inference.cusparselt import (
    SparseGemm,
    UnsearchedSparseGemm,
    half_type,
    may_search,
    search_algorithm,
    why_no_sparse_gemms,
)
from helpers.inference.errors import DeadContextError
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


def test_the_fastest_algorithm_is_found_and_tried(cusparselt):
    layer, x = pruned_linear(32, 16), random(8, 32)
    found = SparseGemm(layer).search(x)
    assert found == {"alg_id": 5, "split_k": 2, "split_k_mode": 1}
    assert cusparselt.calls[-1] == found
    assert UnsearchedSparseGemm(layer).search(x) == {}


def test_a_way_to_split_k_that_pytorch_does_not_take_is_left_out(cusparselt):
    cusparselt.refuses = {"split_k": 2}
    found = SparseGemm(pruned_linear(32, 16)).search(random(8, 32))
    assert found == {"alg_id": 5}


def test_a_search_that_leaves_cuda_dead_names_what_it_tried(cusparselt, monkeypatch):
    cusparselt.refuses = {"split_k": 2}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", cusparselt.dead)
    with pytest.raises(DeadContextError, match=r"product with {'alg_id': 5, 'split_k': 2"):
        search_algorithm(torch.eye(16), torch.zeros(16, 8))


@pytest.fixture(params=[(9, 0), (8, 0)], ids=["H100", "A100"])
def capability(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    return request.param


def test_only_an_h100_may_not_search_in_fp16(capability):
    is_h100 = capability == (9, 0)
    assert may_search(torch.bfloat16)
    assert may_search(torch.int8)
    assert may_search(torch.float16) != is_h100
    assert half_type() == (torch.bfloat16 if is_h100 else torch.float16)


def test_where_the_search_breaks_cuda_the_default_algorithm_stands(capability, cusparselt):
    class OnGpu(torch.Tensor):
        is_cuda = True

    columns = torch.zeros(16, 8, dtype=torch.float16).as_subclass(OnGpu)
    found = search_algorithm(torch.eye(16, dtype=torch.float16), columns)
    assert (found == {}) == (capability == (9, 0))
    assert bool(cusparselt.calls) == (capability != (9, 0))


@pytest.mark.gpu
@needs_cusparselt
@pytest.mark.parametrize("rows", [1, 8, 13])
@pytest.mark.parametrize("kind", [SparseGemm, UnsearchedSparseGemm])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["FP16", "BF16"])
def test_a_sparse_gemm_is_the_dense_one_on_the_gpu(rows, kind, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(64, 128)
    prune_2to4_(layer)
    layer = layer.to("cuda", dtype)
    kernel = kind(layer, Epilogue("ReLU"))
    x = random(rows, 64).to("cuda", dtype)
    tolerance = 1e-2 if dtype == torch.float16 else 5e-2  # BF16 has three bits fewer
    fill_free_memory_with_nan()
    with torch.inference_mode():
        for algorithm in ({}, kernel.search(x)):
            assert max_relative_error(kernel(x, **algorithm), layer(x).relu()) < tolerance
