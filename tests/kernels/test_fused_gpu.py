"""Max-pool, norm and activation fused for a GPU equal PyTorch's, one after the other.

The kernels are checked in Triton's interpreter and compiled for a GPU that is not here; the operator around them
computes on a CPU in plain PyTorch. Tests marked `gpu` launch the kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_fast.hardware.cuda_graph import WARM_UPS, CapturedFunction
from cifar_fast.kernels import fused_gpu
from cifar_fast.recipes import named
from cifar_fast.training.layers import Block, Conv3x3, GhostBatchNorm
from cifar_fast.training.model import build_model

needs_triton = pytest.mark.skipif(
    not fused_gpu.HAS_TRITON and os.environ.get("CI") != "true", reason="needs Triton, which torch's CUDA build has"
)
ACTIVATIONS = {"relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU(), "celu": nn.CELU(0.25)}
POOL = pytest.mark.parametrize("pool", [False, True], ids=["not_pooled", "pooled"])
EACH = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


def images(n: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Channels-last, each channel with a mean far from 0."""
    generator = torch.Generator().manual_seed(n * channels + height)
    x = 2 * torch.randn(n, channels, height, width, generator=generator)
    x += 20 * torch.randn(1, channels, 1, 1, generator=generator)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def ghost_norm(channels: int, group_size: int) -> GhostBatchNorm:
    norm = GhostBatchNorm(channels, group_size, eps=1e-3, momentum=0.1, freeze_scale=False).double()
    norm.weight.data.copy_(torch.linspace(0.5, 2, channels))
    norm.bias.data.copy_(torch.linspace(-2, 2, channels))
    return norm


# --- The kernels ---


def release(package: ModuleType) -> tuple[int, ...]:
    return tuple(int(number) for number in package.__version__.split(".")[:2])


@needs_triton
def test_in_tritons_interpreter_the_kernels_equal_torch_in_double_precision() -> None:
    import triton

    if release(triton) < (3, 7) and release(numpy) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 turns arrays into numbers as NumPy 2.4 no longer allows")
    script = Path(__file__).with_name("interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("imported before it is needed") is False
    assert len(found) == 2 * len(ACTIVATIONS) + 3
    for case, errors in found.items():
        rounded = {"torch.float16": 1e-3, "torch.bfloat16": 1e-2, "ties": 1e-12}.get(case, 3e-5)
        sums = min(rounded, 1e-5)  # statistics and the parameters' gradients are never rounded to half precision
        assert {"y", "dx"} <= errors.keys() and len(errors) == 6
        for name, error in errors.items():
            assert error < (rounded if name in ("y", "dx") else sums), f"{case}: {name} is off by {error}"


class Recorded:
    """Takes the place of a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert min(grid) > 0 and max(grid[1:], default=1) < 65536

        def launch(*arguments: Any, **others: Any) -> None:
            names = [parameter.name for parameter in self.kernel.params]
            self.launches.append((self.kernel, dict(zip(names, arguments, strict=False)) | others))

        return launch


POINTERS = {torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}


def compiled_for_hopper(kernel: Any, arguments: dict[str, Any]) -> Any:
    """Compile for compute capability 9.0 as a launch with these arguments would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    for number, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {name: value for name, value in arguments.items() if name == "num_warps"}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@needs_triton
def test_the_kernels_compile_for_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cifar_fast.kernels import fused_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches: list[tuple[Any, dict[str, Any]]] = []
    for name in [name for name in vars(fused_triton) if name.startswith("norm_")]:
        monkeypatch.setattr(fused_triton, name, Recorded(getattr(fused_triton, name), launches))
    weight, bias = torch.empty(2, 256, device="meta").unbind()
    for pool, activation in ((True, "celu"), (False, "gelu")):
        x = torch.empty(1536, 256, 15, 15, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
        y, pooled, winner, mean, variance, _ = fused_triton.forward(x, weight, bias, activation, 0.3, 192, 1e-5, pool)
        values = pooled if pool else x
        fused_triton.backward(y, values, winner, mean, variance, weight, bias, activation, 0.3, 1e-5, 15, 15)
    assert len(launches) == 2 * 6
    kinds = {}
    for kernel, arguments in launches:  # each variant once
        constants = tuple(arguments[each.name] for each in kernel.params if each.is_constexpr)
        kinds.setdefault((kernel.fn.__name__, constants), (kernel, arguments))
    assert len(kinds) == 2 + 1 + 2 + 2 + 1 + 2
    for (name, _), launch in kinds.items():
        code = compiled_for_hopper(*launch).asm
        assert ".target sm_90" in code["ptx"] and f".entry {name}" in code["ptx"]
        assert code["cubin"].startswith(b"\x7fELF")
        assert "ld.global.v4" in code["ptx"], "each thread reads 16 bytes at a time"


# --- The operator ---


@EACH
@POOL
def test_the_operator_on_a_cpu_equals_the_layers_one_after_the_other(activation: nn.Module, pool: bool) -> None:
    norm, x = ghost_norm(5, 2), images(6, 5, 7, 6).requires_grad_()
    wanted = (x, norm.weight, norm.bias)
    expected = activation(norm(F.max_pool2d(x, 2) if pool else x))
    dy = images(*expected.shape)
    y, (mean, variance) = fused_gpu.normalise_and_activate(
        x, norm.weight, norm.bias, activation, group_size=2, eps=norm.eps, pool=pool
    )
    assert y.is_contiguous(memory_format=torch.channels_last) and not (mean.requires_grad or variance.requires_grad)
    pairs = zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True)
    for found, other in ((y, expected), *pairs):
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance)


@pytest.mark.parametrize("name", ACTIVATIONS)
@POOL
def test_the_operator_is_one_that_torch_can_differentiate_and_compile(name: str, pool: bool) -> None:
    arguments = (images(2, 3, 5, 4), torch.rand(3).double(), torch.rand(3).double())
    arguments = tuple(each.requires_grad_() for each in arguments)
    rest = (name, 0.3, 1, 1e-3, pool)
    assert torch.autograd.gradcheck(lambda *some: fused_gpu.norm_activation(*some, *rest)[0], arguments)
    if name == "silu":
        torch.library.opcheck(fused_gpu.norm_activation, (*arguments, *rest))


def test_a_gradient_in_another_layout_is_taken() -> None:
    norm, x = ghost_norm(5, 2), images(4, 5, 6, 6)
    gradients = []
    for dy in (images(4, 5, 3, 3), images(4, 5, 3, 3).contiguous()):
        leaf = x.clone().requires_grad_()
        y, _ = fused_gpu.normalise_and_activate(
            leaf, norm.weight, norm.bias, nn.SiLU(), group_size=2, eps=1e-3, pool=True
        )
        gradients += torch.autograd.grad(y, leaf, dy)
    assert torch.equal(*gradients)


def test_a_kernel_that_cannot_be_compiled_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise ValueError("no such instruction\nat line 3")

    where = (torch.device("cpu"), torch.float32, "silu", 1.0, 1e-5)
    assert fused_gpu.failure.__wrapped__(*where) == ""
    with monkeypatch.context() as patch:
        patch.setattr(fused_gpu, "norm_activation", broken)
        assert fused_gpu.failure.__wrapped__(*where) == "ValueError: no such instruction"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", range(5))
def test_kernels_whose_results_differ_are_not_used(
    dtype: torch.dtype, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = (torch.device("cpu"), dtype, "gelu", 1.0, 1e-5)
    assert fused_gpu.failure.__wrapped__(*where) == ""
    calls: list[int] = []
    right = fused_gpu._try_out

    def wrong(*arguments: Any) -> list[torch.Tensor]:
        calls.append(len(calls))
        return [each * (1.05 if len(calls) == 4 and i == place else 1) for i, each in enumerate(right(*arguments))]

    monkeypatch.setattr(fused_gpu, "_try_out", wrong)  # one result of the last of four calls is 5 % too large
    assert fused_gpu.failure.__wrapped__(*where) == "their results differ from those of PyTorch"


# --- On a GPU ---


def block(*, fuse: bool) -> Block:
    layers = Block()
    layers.fuse = fuse
    layers.add_module("conv", Conv3x3(8, 16, pool=True))
    layers.add_module("norm", ghost_norm(16, 4).float())
    layers.add_module("activation", nn.SiLU())
    return layers.to("cuda", memory_format=torch.channels_last)


def is_fused(y: Tensor) -> bool:
    return "norm_activation" in y.grad_fn.name()


@pytest.fixture
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.gpu
def test_a_block_on_a_gpu_is_fused_unless_something_watches_or_does_not_suit() -> None:
    x = images(8, 8, 6, 6, torch.float32).cuda()
    layers = block(fuse=True)
    plain = block(fuse=False)
    plain.load_state_dict(layers.state_dict())
    expected = plain(x)
    assert is_fused(layers(x)) and not is_fused(expected)
    seen: list[torch.Size] = []
    for name in ("conv", "norm", "activation"):
        module = layers.get_submodule(name)
        handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        torch.testing.assert_close(layers(x), expected, rtol=1e-3, atol=1e-3)
        handle.remove()
    assert seen == [expected.shape] * 3
    assert not is_fused(layers(x[:6])), "one and a half groups"
    assert not is_fused(layers.eval()(x))
    torch.testing.assert_close(layers(x).shape, expected.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("name", ["speedrun", "apple_8gpu"])
def test_a_network_on_a_gpu_is_the_same_fused_and_not(
    name: str, captured: bool, no_tf32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = Mock(side_effect=fused_gpu.normalise_and_activate)
    monkeypatch.setattr(fused_gpu, "normalise_and_activate", fused)
    recipe = replace(named(name), ghost_batch_size=4)
    recipe = replace(recipe, widths=(24, 40, 72, 72)[-len(recipe.widths) :])
    mean, std = torch.full((3,), 128.0), torch.full((3,), 64.0)
    networks = [build_model(recipe, 10, mean, std, fuse_norm=fuse) for fuse in (False, True)]
    networks[0].load_state_dict(networks[1].state_dict())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last).cuda()
    found, calls = [], []
    for network in networks:
        network.to("cuda", memory_format=torch.channels_last)
        parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        before = {name: buffer.clone() for name, buffer in network.named_buffers()}

        def outcome(x: Tensor, network: nn.Module = network, parameters: Any = parameters) -> tuple[Tensor, ...]:
            y = network(x)
            return y.detach(), *torch.autograd.grad(y.square().sum(), parameters.values())

        run = CapturedFunction(outcome, x) if captured else outcome
        for key, buffer in network.named_buffers():
            buffer.copy_(before[key])  # the first calls of a captured function have moved them
        results = dict(zip(("y", *parameters), run(x), strict=True))
        calls.append(fused.call_count)
        found.append({key: value.double().cpu() for key, value in (results | dict(network.named_buffers())).items()})
    assert calls == [
        0,
        (WARM_UPS + 1 if captured else 1) * sum(isinstance(each, Block) for each in networks[1].modules()),
    ]
    for key, expected in found[0].items():
        assert (found[1][key] - expected).norm() <= 1e-3 * expected.norm() + 1e-5, key
