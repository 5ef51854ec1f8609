"""Models and a fake cuSPARSELt for the tests of PyTorch's sparse runner and its parts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import Bottleneck, ResNet

from helpers.sparsity import is_2to4, prune_2to4_
from helpers.training import networks

GAP = 1e-5  # FP32: the order of the sums differs


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quick_network() -> nn.Module:
    return networks.create_model("resnext14_8x1d", 10)


def bottlenecks() -> nn.Module:
    """ResNet-50's blocks; from the second stage on, downsamples have stride 2."""
    network = ResNet(Bottleneck, [2, 1, 1, 1], num_classes=16)
    network.maxpool = nn.Identity()
    return network


def linear_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 16)
    )


def transformer() -> nn.Module:
    """Two blocks of a vision transformer; torchvision starts its head with zeros."""
    network = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128,
        num_classes=16,
    )  # fmt: skip
    nn.init.normal_(network.heads.head.weight)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.1)
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "quick": (quick_network, (1, 28, 28)),
    "bottlenecks": (bottlenecks, (3, 32, 32)),
    "linear": (linear_network, (48,)),
    "transformer": (transformer, (3, 32, 32)),
}


def prepared(model: nn.Module, images: Tensor) -> nn.Module:
    """Return the model pruned 2:4, whose batch norms have statistics other than 0 and 1."""
    model(images)
    prune_2to4_(model)
    return model.eval()


class FakeCusparselt:
    """PyTorch's binding of cuSPARSELt, on the CPU and with its contract.

    It knows the dense matrix by its memory and by whether it is contiguous, and no strides. INT8
    it multiplies as whole numbers; `alpha` and another type of the output come with INT8 alone.
    """

    algorithm = (5, 2, 1)

    def __init__(self) -> None:
        self.calls: list[dict[str, int]] = []
        self.refuses: dict[str, int] = {}  # arguments that are not taken

    def dead(self, *_: object, **__: object) -> None:
        """Fail as every call does after a kernel has broken the context."""
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    def compress(self, weight: Tensor) -> Tensor:
        assert weight.is_contiguous()
        assert is_2to4(weight)
        step = 32 if weight.dtype == torch.int8 else 16
        assert all(size % step == 0 for size in weight.shape)
        return weight.clone()

    def sparse_mm(
        self,
        compressed: Tensor,
        dense: Tensor,
        bias: Tensor | None = None,
        alpha: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
        **algorithm: int,
    ) -> Tensor:
        self.calls.append(algorithm)
        assert compressed.dtype == dense.dtype
        if self.refuses and self.refuses.items() <= algorithm.items():
            raise RuntimeError(f"cuSPARSELt does not take {self.refuses}")
        k, n = dense.shape
        if dense.is_contiguous():
            seen = dense.as_strided((k, n), (n, 1))
        else:
            seen = dense.as_strided((n, k), (k, 1)).t()
        if dense.dtype == torch.int8:
            assert k % 16 == n % 16 == 0
            assert bias is None
            assert out_dtype in (torch.float16, torch.bfloat16)
            assert alpha is not None
            assert alpha.dtype == torch.float32
            assert alpha.shape == compressed.shape[:1]
            product = (compressed.int() @ seen.int() * alpha[:, None]).to(out_dtype)
        else:
            assert alpha is out_dtype is None
            assert k % 8 == n % 8 == 0
            product = compressed @ seen
        if bias is not None:
            product += bias[:, None]
        return product.t().contiguous() if transpose_result else product

    def mm_search(
        self,
        compressed: Tensor,
        dense: Tensor,
        bias: Tensor | None,
        alpha: Tensor | None,
        out_dtype: torch.dtype | None,
        transpose_result: bool,
    ) -> tuple[int, int, int, int]:
        self.sparse_mm(compressed, dense, bias, alpha, out_dtype, transpose_result)
        return (*self.algorithm, 40)


def pruned_linear(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    prune_2to4_(layer)
    return layer.requires_grad_(False)


@contextmanager
def fake_cusparselt() -> Iterator[FakeCusparselt]:
    fake = FakeCusparselt()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_cslt_compress", fake.compress)
        patch.setattr(torch, "_cslt_sparse_mm", fake.sparse_mm)
        patch.setattr(torch._C, "_cusparselt", fake, raising=False)
        yield fake


def the_fastest_is(name: str) -> Callable[[Sequence], list[float]]:
    """Return a timer that finds one kernel twice as fast as all others."""

    def timer(calls: Sequence) -> list[float]:
        return [0.5 if call.func.name == name else 1.0 for call in calls]

    return timer


def fill_free_memory_with_nan() -> None:
    """Fill the memory that PyTorch will hand out next with NaN."""
    blocks = [torch.full((2**size,), float("nan"), device="cuda") for size in range(8, 27)]
    torch.cuda.synchronize()
    del blocks
