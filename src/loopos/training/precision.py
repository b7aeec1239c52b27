"""Device and number format of training: half-precision weights with fp32 masters, or autocast with a loss scale.

Enters: the named parameters of a model. Leaves: what the optimizer trains (`MasterWeights`). Half-precision weights
halve the memory that each forward and backward reads, while the optimizer and the sum of gradients over micro-batches
and ranks stay in fp32. Left out: the step itself (`update.py`).
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
    """ "auto" → CUDA, else MPS, else CPU. Raises `UserError` for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if not there[name]:
        raise SettingError(
            "training.device", f"got {name}, but torch {torch.__version__} sees no such device; use auto or cpu"
        )
    return torch.device(name)


def resolve(precision: str, device: torch.device) -> str:
    """ "auto" → bf16 where the device multiplies it natively, else fp32 (fp16 on CUDA without bf16); other values
    stay. Raises `UserError` for fp16 on another device than CUDA.
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
    """AVX-512 BF16 or AMX: without them bf16 products are emulated and slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class MasterWeights:
    """fp32 masters of the parameters that train, and the fp32 sum of their gradients.

    `parameters` (name → fp32 parameter) is what the optimizer trains. Where a model's parameter is fp32 it is its own
    master. Otherwise the master takes the fp32 values, the model's parameter becomes half precision, and each
    micro-batch's gradient is added to the master's and freed at once. Of a model that is shared out over the processes
    a master is this process's rows, in the memory of the model's own share; `rows` tells which (name → rows).
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        may_train: Collection[str],
        half: Callable[[str], torch.dtype | None],
        sharding: Sharding | None = None,
    ) -> None:
        """named: every parameter of the model. may_train: names that train now or later. half: the format of a
        parameter by name, None to keep it as it is. sharding: how the model is shared out, formats included; None where
        it is not.
        """
        self.sharding = sharding
        self.rows: dict[str, Rows] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self._shares: dict[str, nn.Parameter] = {}
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self._fresh: set[str] = set()
        self._zeros: dict[str, Tensor] = {}
        for name, parameter in named.items():
            dtype = half(name) if sharding is None else None
            whole = parameter.data
            if dtype is not None:
                parameter.data = whole.to(dtype)
            if name not in may_train:
                parameter.requires_grad_(False)
            elif sharding is not None:
                self.rows[name] = sharding.share_of(parameter)
                self.parameters[name], self._shares[name] = nn.Parameter(_share_of(parameter)), parameter
            elif dtype is None:
                self.parameters[name] = parameter
            else:
                self.parameters[name] = nn.Parameter(whole)
                self._pairs[name] = (parameter, self.parameters[name])
        self.set_training(may_train)

    def set_training(self, names: Collection[str]) -> None:
        """From now on the parameters of these names train, and the rest of `may_train` rest."""
        for name, master in self.parameters.items():
            master.requires_grad_(name in names)
            if name not in names:
                master.grad = None
        for name, (parameter, master) in self._pairs.items():
            parameter.requires_grad_(name in names)
            if name in names and not parameter._post_accumulate_grad_hooks:
                # torch leaves this method's annotations out.
                parameter.register_post_accumulate_grad_hook(self._collector(name, master))  # type: ignore[no-untyped-call]
                sum_gradient_of(parameter, partial(self._sum, name, master))
        for name, parameter in self._shares.items():
            parameter.requires_grad_(name in names)
        if self.sharding is not None:
            self.sharding.refresh()

    @property
    def num_elements(self) -> int:
        """Numbers of all masters, of all processes together where they share them."""
        return sum(
            math.prod(self.rows[name].shape) if name in self.rows else master.numel()
            for name, master in self.parameters.items()
        )

    def keep_zeros(self, zeros: Mapping[str, Tensor]) -> None:
        """From now on weights under these masks (by name, True = zero) get no gradient and are zero after each step.

        Without a gradient the moments of an optimizer stay zero too, and so does what it adds; one that mixes a
        matrix's entries, as Muon does, is undone where it fills a zero.
        """
        self._zeros = {
            name: self.rows[name].of(mask).to(self.parameters[name].device) if name in self.rows else mask
            for name, mask in zeros.items()
            if name in self.parameters
        }

    def _collector(self, name: str, master: nn.Parameter) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            if parameter.grad is None:
                # An operation added the gradient to the sum itself.
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
        """Forgets the gradients of the last step. Masters keep their buffers: the first micro-batch overwrites them."""
        self._fresh = set(self._pairs)
        for name, parameter in self.parameters.items():
            if name not in self._pairs:
                parameter.grad = None
        for parameter in self._shares.values():
            parameter.grad = None
        if self.sharding is not None:
            self.sharding.begin()

    def finish(self) -> None:
        """Zeroes the gradients that no micro-batch of this step wrote, so that every rank sums the same set. Those of
        shares are sums over all ranks already.
        """
        for name, parameter in self._shares.items():
            if parameter.grad is not None:
                self.parameters[name].grad = _share_of(parameter.grad)
        for name, parameter in self.parameters.items():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.requires_grad and name in self._fresh:
                assert parameter.grad is not None
                parameter.grad.zero_()
        for name, zeros in self._zeros.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(zeros, 0.0)
        self._fresh = set()

    def squares(self) -> float:
        """Σ g² over this process's gradients; where several processes hold the same weights, this one's part of it."""
        found = 0.0
        for name, parameter in self.parameters.items():
            # A share without rows has no norm of its own.
            if parameter.requires_grad and parameter.grad is not None and parameter.numel():
                copies = self.rows[name].copies if name in self.rows else 1
                found += float(torch.linalg.vector_norm(parameter.grad)) ** 2 / copies
        return found

    def trained(self) -> list[nn.Parameter]:
        """The masters that train now, in the model's order."""
        return [parameter for parameter in self.parameters.values() if parameter.requires_grad]

    @torch.no_grad()
    def write_back(self) -> None:
        """Puts the zeros that are kept back where they were, and rounds the masters into the model."""
        for name, zeros in self._zeros.items():
            if self.parameters[name].requires_grad:
                self.parameters[name].masked_fill_(zeros, 0.0)
        for parameter, master in self._pairs.values():
            if master.requires_grad:
                parameter.copy_(master)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the weights of a checkpoint into masters and model. Raises `ValueError` when names or shapes differ."""
        if set(tensors) != set(self.parameters):
            raise ValueError(f"weights of other parameters: {sorted(set(tensors) ^ set(self.parameters))[:3]}")
        if self.sharding is not None:
            self.sharding.begin()
        for name, master in self.parameters.items():
            master.copy_(rows_of(tensors, name, self.rows.get(name)))
        for parameter, master in self._pairs.values():
            parameter.copy_(master)


def _share_of(tensor: Tensor) -> Tensor:
    """The rows that this process holds, in the same memory."""
    assert isinstance(tensor, DTensor), type(tensor)
    with torch.no_grad():
        share: Tensor = tensor.to_local().detach()
    return share
