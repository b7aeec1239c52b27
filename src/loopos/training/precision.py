"""Device and number format of training: half-precision weights with fp32 master weights, or autocast with a loss scale.

Half-precision weights halve the memory traffic of each forward and backward pass. The optimizer and the sum of
gradients over micro-batches and ranks stay in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loopos.config.diagnostics import SettingError
from loopos.functional.reductions import sum_gradient_of
from loopos.training.sharding import Rows, Sharding
from loopos.training.slices import rows_of


def pick_device(name: str) -> torch.device:
    """ "auto" → CUDA, else MPS, else CPU. Raises `UserError` for a device that is not available."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if not there[name]:
        raise SettingError(
            "training.device", f"got {name}, but torch {torch.__version__} sees no such device; use auto or cpu"
        )
    return torch.device(name)


def resolve(precision: str, device: torch.device) -> str:
    """ "auto" → bf16 if the device multiplies it natively, else fp32 (fp16 on CUDA without bf16); other values are
    returned unchanged. Raises `UserError` for fp16 on a device other than CUDA.
    """
    if precision == "fp16" and device.type != "cuda":
        raise SettingError(
            "training.precision",
            f"got fp16, but the device is {device.type}, and only CUDA trains in fp16; use auto, fp32 or bf16",
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        capable = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "bf16" if capable and _has_bf16_instructions() else "fp32"
    return "fp32"


def _has_bf16_instructions() -> bool:
    """Whether the CPU has AVX-512 BF16 or AMX; without them bf16 products are emulated and slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class MasterWeights:
    """fp32 master weights of the trainable parameters, and the fp32 sums of their gradients.

    `parameters` (name → fp32 parameter) is what the optimizer trains. An fp32 parameter of the model is its own master
    weight. Otherwise the master weight takes the fp32 values, the model's parameter becomes half precision, and the
    gradient of each micro-batch is added to the master weight's gradient and freed at once. With a sharded model, a
    master weight is this process's rows and shares memory with the model's shard; `rows` maps names to rows.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        may_train: Collection[str],
        half: Callable[[str], torch.dtype | None],
        sharding: Sharding | None = None,
    ) -> None:
        """named: all parameters of the model. may_train: names that train now or later. half: number format of a
        parameter by name, None to keep it. sharding: how the model is sharded, including formats; None if it is not.
        """
        self.sharding = sharding
        self.rows: dict[str, Rows] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self._shards: dict[str, nn.Parameter] = {}
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self._fresh: set[str] = set()
        self._zeros: dict[str, Tensor] = {}
        self._still: dict[str, Tensor] = {}
        for name, parameter in named.items():
            dtype = half(name) if sharding is None else None
            whole = parameter.data
            if dtype is not None:
                parameter.data = whole.to(dtype)
            if name not in may_train:
                parameter.requires_grad_(False)
            elif sharding is not None:
                self.rows[name] = sharding.local_rows(parameter)
                self.parameters[name], self._shards[name] = nn.Parameter(_local_shard(parameter)), parameter
            elif dtype is None:
                self.parameters[name] = parameter
            else:
                self.parameters[name] = nn.Parameter(whole)
                self._pairs[name] = (parameter, self.parameters[name])
        self.set_training(may_train)

    def set_training(self, names: Collection[str]) -> None:
        """Trains the parameters of these names and freezes the rest of `may_train`."""
        for name, master in self.parameters.items():
            master.requires_grad_(name in names)
            if name not in names:
                master.grad = None
        for name, (parameter, master) in self._pairs.items():
            parameter.requires_grad_(name in names)
            if name in names and not parameter._post_accumulate_grad_hooks:
                # torch does not annotate this method.
                parameter.register_post_accumulate_grad_hook(self._collector(name, master))  # type: ignore[no-untyped-call]
                sum_gradient_of(parameter, partial(self._sum, name, master))
        for name, parameter in self._shards.items():
            parameter.requires_grad_(name in names)
        if self.sharding is not None:
            self.sharding.refresh()

    @property
    def num_elements(self) -> int:
        """Number of elements of all master weights, over all processes."""
        return sum(
            math.prod(self.rows[name].shape) if name in self.rows else master.numel()
            for name, master in self.parameters.items()
        )

    def keep_zeros(self, zeros: Mapping[str, Tensor]) -> None:
        """Keeps weights under these masks (by name, True = zero) at zero: they get no gradient and are zeroed after
        each step.

        Without a gradient the optimizer's moments stay zero too. Optimizers that mix the entries of a matrix, such as
        Muon, need the zeroing.
        """
        self._zeros = {
            name: self.rows[name].of(mask).to(self.parameters[name].device) if name in self.rows else mask
            for name, mask in zeros.items()
            if name in self.parameters
        }

    def train_rows(self, masks: Mapping[str, Tensor]) -> None:
        """Trains only some rows of matrices: name → bool `[V]`, True = trains. The others get no gradient, and the
        optimizer no decay for the matrix, so they stay as they are to the bit.
        """
        for name, mask in masks.items():
            still = ~mask[:, None].expand(mask.shape[0], self._width(name))
            own = self.rows[name].of(still) if name in self.rows else still
            self._still[name] = own.to(self.parameters[name].device)

    def _width(self, name: str) -> int:
        return (self.rows[name].shape if name in self.rows else self.parameters[name].shape)[1]

    @property
    def partly_trained(self) -> frozenset[str]:
        """The names of matrices of which only some rows train."""
        return frozenset(self._still)

    def _collector(self, name: str, master: nn.Parameter) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            if parameter.grad is None:
                # The operation has already added its gradient to the sum.
                return
            if master.grad is None:
                master.grad = parameter.grad.float()
            elif name in self._fresh:
                master.grad.copy_(parameter.grad)
            else:
                master.grad.add_(parameter.grad)
            self._fresh.discard(name)
            parameter.grad = None

        return collect

    def _sum(self, name: str, master: nn.Parameter) -> Tensor:
        """The sum of this step's gradients so far, for operations that add to it themselves."""
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        elif name in self._fresh:
            master.grad.zero_()
        self._fresh.discard(name)
        return master.grad

    def begin(self) -> None:
        """Clears the gradients of the last step. Master weights keep their buffers: the first micro-batch overwrites
        them.
        """
        self._fresh = set(self._pairs)
        for name, parameter in self.parameters.items():
            if name not in self._pairs:
                parameter.grad = None
        for parameter in self._shards.values():
            parameter.grad = None
        if self.sharding is not None:
            self.sharding.begin()

    def finish(self) -> None:
        """Zeroes gradients that no micro-batch of this step wrote, so that every rank sums the same set. Gradients of
        shards are already summed over all ranks.
        """
        for name, parameter in self._shards.items():
            if parameter.grad is not None:
                self.parameters[name].grad = _local_shard(parameter.grad)
        for name, parameter in self.parameters.items():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.requires_grad and name in self._fresh:
                assert parameter.grad is not None
                parameter.grad.zero_()
        for name, zeros in (*self._zeros.items(), *self._still.items()):
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(zeros, 0.0)
        self._fresh = set()

    def squares(self) -> float:
        """Σ g² over this process's gradients. Where several processes have the same weights, each counts its part."""
        found = 0.0
        for name, parameter in self.parameters.items():
            # An empty shard has no norm.
            if parameter.requires_grad and parameter.grad is not None and parameter.numel():
                copies = self.rows[name].copies if name in self.rows else 1
                found += float(torch.linalg.vector_norm(parameter.grad)) ** 2 / copies
        return found

    def trained(self) -> list[nn.Parameter]:
        """The master weights that train now, in the model's order."""
        return [parameter for parameter in self.parameters.values() if parameter.requires_grad]

    @torch.no_grad()
    def write_back(self) -> None:
        """Restores the zeros of the sparsity masks and rounds the master weights into the model."""
        for name, zeros in self._zeros.items():
            if self.parameters[name].requires_grad:
                self.parameters[name].masked_fill_(zeros, 0.0)
        for parameter, master in self._pairs.values():
            if master.requires_grad:
                parameter.copy_(master)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the weights of a checkpoint into master weights and model. Raises `ValueError` if names or shapes
        differ.
        """
        if set(tensors) != set(self.parameters):
            raise ValueError(f"weights of other parameters: {sorted(set(tensors) ^ set(self.parameters))[:3]}")
        if self.sharding is not None:
            self.sharding.begin()
        for name, master in self.parameters.items():
            master.copy_(rows_of(tensors, name, self.rows.get(name)))
        for parameter, master in self._pairs.values():
            parameter.copy_(master)


def _local_shard(tensor: Tensor) -> Tensor:
    """The rows of this process, in the same memory."""
    assert isinstance(tensor, DTensor), type(tensor)
    with torch.no_grad():
        shard: Tensor = tensor.to_local().detach()
    return shard
