"""Who takes part when the reflection is timed on a GPU, on which data, and what their answers are held to.

Letters: n rows, d in_features, o out_features, r rank.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.cuda_operator import CudaOperator
from benchmarks.roofline import Shape, Work
from hra_export.reflection import Factors, factor, reflect_rows

Kernel = Callable[[int], Tensor]

COMPILED_ROWS, COMPILED_RANK = (1, 64, 4096), 8
FEW_ROWS, TRAINING_ROWS = 64, 512
ADAPTERS, MEMBERS = 8, 3
# Of the largest element: the result is rounded once, and so are the r coefficients of a row in the plain calls.
TOLERANCES = {"float32": 1e-5, "float16": 2**-8, "bfloat16": 2**-5}


class Data:
    """Copies of what one shape needs: enough to be larger than the cache, the weights by themselves."""

    def __init__(self, shape: Shape, device: torch.device, count: int, weights: int) -> None:
        dtype, n, d, r = getattr(torch, shape.dtype), shape.rows, shape.features, shape.rank
        random = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(*sizes, generator=random, device=device, dtype=kind)

        self.x = [normal(n, d) for _ in range(count)]
        self.vectors = [normal(d, r, kind=torch.float32) for _ in range(count)]
        factors = [factor(vectors, dtype) for vectors in self.vectors]
        self.u, self.s = [each.u for each in factors], [each.s for each in factors]
        self.half_s = [each.s.to(dtype) for each in factors]
        self.v = [-(each.s @ each.u.float().T).to(dtype) for each in factors]  # of the ONNX operator, (r, d)
        self.thin_u = [each.u.contiguous() for each in factors]  # of the ONNX operator, (d, r)
        self.w = [normal(shape.outputs, d) for _ in range(weights)]
        self.a, self.b = normal(d, r), normal(r, shape.outputs)
        self.chains = normal(ADAPTERS, d, r, kind=torch.float32)
        self.adapters = factor(self.chains, dtype)
        self.index = torch.arange(n, device=device) % ADAPTERS  # (n,), which adapter a row has

    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        """U and V of the ONNX operator, of a copy."""
        return self.thin_u[i % len(self.u)], self.v[i % len(self.v)]

    def weight(self, i: int) -> Tensor:
        """W (d, o) of a copy."""
        return self.w[i % len(self.w)].T


def three_calls(x: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """x − ((x U) S) Uᵀ."""
    return torch.addmm(x, (x @ u) @ s, u.T, alpha=-1)


def contenders(data: Data, shape: Shape, cuda_operator: CudaOperator | None) -> dict[str, Kernel]:
    """Name → its call on a copy of the data."""

    def reflect(i: int) -> Tensor:
        z: Tensor = torch.ops.hra.reflect(data.x[i], data.vectors[i], data.u[i], data.s[i])[0]
        return z

    calls: dict[str, Kernel] = {
        "three calls": lambda i: three_calls(data.x[i], data.u[i], data.half_s[i]),
        "reflect": reflect,
        "product": lambda i: data.x[i] @ data.weight(i),
        "reflect + product": lambda i: reflect(i) @ data.weight(i),
        "product + LoRA": lambda i: torch.addmm(data.x[i] @ data.weight(i), data.x[i] @ data.a, data.b),
    }
    if shape.rows <= FEW_ROWS:
        calls["rows"] = lambda i: reflect_rows(data.x[i], data.index, data.adapters)
    if shape.rows == 1:
        calls["factor"] = lambda i: factor(data.chains, data.x[0].dtype).u[0]
    if shape.rows >= TRAINING_ROWS:
        m = [torch.ops.hra.reflect(*each)[1] for each in zip(data.x, data.vectors, data.u, data.s, strict=True)]
        calls["backward"] = lambda i: backward(data, m, i)
    if cuda_operator is not None:
        calls["operator"] = lambda i: cuda_operator(data.x[i], data.pair(i))[0]
        calls["operator, group"] = lambda i: cuda_operator(data.x[i], *(data.pair(i + j) for j in range(MEMBERS)))[0]
    if shape.rank == COMPILED_RANK and shape.rows in COMPILED_ROWS and data.x[0].is_cuda:
        compiled = torch.compile(three_calls, dynamic=False)
        calls["compiled"] = lambda i: compiled(data.x[i], data.u[i], data.half_s[i])
    return calls


def backward(data: Data, m: Sequence[Tensor], i: int) -> Tensor:
    """∂x of ∂z = x, and ∂U beside it."""
    x = data.x[i]
    grad_x: Tensor = torch.ops.hra.reflect_backward(x, x, data.vectors[i], data.u[i], data.s[i], m[i], True, True)[0]
    return grad_x


def works(shape: Shape) -> dict[str, Work]:
    """Name → what it has to move; the product is in what stands before or behind it."""
    base = roofline.product(shape)
    return {
        "three calls": roofline.reflect_in_three_calls(shape),
        "compiled": roofline.reflect_in_three_calls(shape),
        "reflect": roofline.reflect(shape),
        "rows": roofline.reflect_rows(shape, ADAPTERS),
        "factor": roofline.factor(shape, ADAPTERS),
        "operator": roofline.operator(shape),
        "operator, group": roofline.operator(shape, MEMBERS),
        "backward": roofline.reflect_backward(shape),
        "product": base,
        "reflect + product": roofline.reflect(shape) + base,
        "product + LoRA": base + roofline.lora(shape),
    }


def wrong(shape: Shape, data: Data, calls: Mapping[str, Kernel]) -> list[str]:
    """Contenders whose numbers depart from float64."""
    x, u, s = (each[0].double() for each in (data.x, data.u, data.s))
    rotated = x - ((x @ u) @ s) @ u.T
    w = data.weight(0).double()
    truths = {
        "rows": lambda: rotated_rows(data.x[0], data.adapters, data.index),
        "factor": lambda: data.adapters.u[0].double(),
        "backward": lambda: x - ((x @ u) @ s.T) @ u.T,
        "product": lambda: x @ w,
        "reflect + product": lambda: rotated @ w,
        "product + LoRA": lambda: x @ w + (x @ data.a.double()) @ data.b.double(),
    }
    findings = []
    for name, call in calls.items():
        truth = truths[name]() if name in truths else rotated
        error = float((call(0).double() - truth).abs().max() / truth.abs().max())
        if not error <= TOLERANCES[shape.dtype]:
            findings.append(f"{label(shape)}, {name}: off by {error:.1e}, allowed {TOLERANCES[shape.dtype]:.1e}")
    return findings


def rotated_rows(x: Tensor, adapters: Factors, index: Tensor) -> Tensor:
    """Row by row, in float64."""
    u, s = adapters.u.double(), adapters.s.double()
    return torch.stack(
        [row - ((row @ u[a]) @ s[a]) @ u[a].T for row, a in zip(x.double(), index.tolist(), strict=True)]
    )


def label(shape: Shape) -> str:
    """As in messages and in the results."""
    return f"d={shape.features} n={shape.rows} r={shape.rank} {shape.dtype}"
