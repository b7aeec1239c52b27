"""Linear layers split among processes that run each pass together, by the plan that transformers carries for the model.

Enters: a model, whole on every process, and the processes. Leaves: the same modules, each with a part of the weights
that the plan names: rows (`colwise`: each process makes some of the output's features) or columns (`rowwise`: each adds
up some of the input's, and the sums are added over the processes). After Shoeybi et al. 2019 (Megatron-LM). An adapter
of LoRA is split as its layer is, on the side that the layer is. What the plan leaves out (embeddings, norms, heads) is
the same on all of these processes, and so is all that it computes. Left out: the rows of a part that further processes
share (`sharding.py`).

A model whose weights, gradients and optimizer are shared out over the processes, on PyTorch's `fully_shard`.

Enters: models that are whole on every process, the section `distributed`. Leaves: the same modules with a share of each
parameter (rows of it) on every process; the model whole for as long as generation lasts; the model whole on the first
process at the end. After Zhao et al. 2023 (FSDP), in PyTorch's second form, which shares out each parameter by itself.
Left out: what the optimizer sees of it (`precision.MasterWeights`), files (`slices.py`).

The layers of a model (the members of its outermost `nn.ModuleList`s) are gathered one at a time, when they run; what
lies outside of them (embeddings, last norm, head) for the whole of a forward and backward pass. Every process must run
the same passes in the same order.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from loopos.config.diagnostics import UserError
from loopos.config.sections import WHOLE_MATRICES, DistributedSection
from loopos.training.distributed import World

_HEADS = ("num_attention_heads", "num_key_value_heads")


def split_layers(root: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Splits all models under `root` over `mesh`, in place, and returns the layers, whose `forward` is now one of their
    own. Raises `UserError` for a model without a plan, or of a size that cannot be split so.
    """
    split = []
    for model in root.modules():
        # A model with a head holds the one that has the layers.
        if isinstance(model, PreTrainedModel) and model.base_model is model:
            for module, style in _planned(model, mesh.size()):
                layer = ALL_PARALLEL_STYLES[style]
                for name, parameter in list(module.named_parameters(recurse=False)):
                    layer.validate_param(module, parameter, mesh, parameter_name=name)
                    layer.shard_param(module, name, mesh)
                layer.install_forward(module, mesh)
                split.append(module)
    return split


def whole_again(split: list[nn.Module]) -> None:
    """The layers run by their class's own `forward`: for weights that have become whole."""
    for module in split:
        del module.forward


def _planned(model: PreTrainedModel, size: int) -> list[tuple[nn.Module, str]]:
    config = model.config.get_text_config()
    plan: dict[str, str] | None = getattr(config, "base_model_tp_plan", None)
    actual = f"distributed.tensor_parallel: got {size} for a model of type {config.model_type}"
    if not plan:
        raise UserError(f"{actual}, for which transformers has no plan; expected tensor_parallel 1, and mode shard")
    for name in _HEADS:
        number = getattr(config, name, size)
        if number % size:
            raise UserError(f"{actual} with {name} {number}; expected a divisor of it")
    found = []
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))
        if style is not None:
            found += list(_split_layers_of(module, style))
    for module, style in found:
        if style in ("colwise", "rowwise"):
            width = getattr(module, "out_features" if style == "colwise" else "in_features", size)
            if width % size:
                raise UserError(f"{actual}, one of whose layers is {width} wide; expected a divisor of it")
    return found


def _split_layers_of(module: nn.Module, style: str) -> Iterator[tuple[nn.Module, str]]:
    """The layer itself, or the one under an adapter with the adapter's matrix on the split side."""
    base = getattr(module, "base_layer", None)
    if not isinstance(base, nn.Module):
        yield module, style
        return
    yield base, style
    side = module.get_submodule("lora_B" if style == "colwise" else "lora_A")
    for matrix in side.children():
        yield matrix, style


_GIB = 2**30
_REPLICAS, _SHARDS, _SPLIT = "replicate", "shard", "tensor"
_MESHES = itertools.count()


@dataclass(frozen=True)
class Rows:
    """The share of a parameter that a process holds: `count` rows of `shape`, from row `first` on; of those `columns`,
    the first and their number, None for all. `copies`: processes that hold the same.
    """

    first: int
    count: int
    shape: tuple[int, ...]
    columns: tuple[int, int] | None = None
    copies: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """These rows and columns, a view."""
        assert tuple(whole.shape) == self.shape, (tuple(whole.shape), self.shape)
        rows = whole[self.first : self.first + self.count]
        return rows if self.columns is None else rows.narrow(1, *self.columns)


class Sharding:
    """How a run's models are shared out. Process `part` of `parts` splits every layer with the others; `rank` of `size`
    such groups hold one copy together; there are `replicas`.
    """

    def __init__(
        self, settings: DistributedSection, world: World, device: torch.device, *, shares: bool = True
    ) -> None:
        """shares: whether weights are shared out, beyond what `tensor_parallel` splits. Raises `UserError` for a
        `shard_size` that does not divide the number of processes, or of groups of them.
        """
        share, among = world.share
        self.parts = world.size // among
        self.part = world.rank % self.parts
        self.size = (settings.shard_size or among) if shares else 1
        if among % self.size:
            groups = "processes" if self.parts == 1 else f"groups of {self.parts} processes"
            raise UserError(
                f"distributed.shard_size: got {self.size} with {among} {groups}; expected a divisor of their number"
            )
        self.replicas, self.rank = among // self.size, share % self.size
        self.is_first_replica = share < self.size
        self.device = device
        self._world = world
        self._unused = settings.cpu_offload and device.type != "cuda"
        self._reshards = settings.reshard_after_forward
        self._offload = CPUOffloadPolicy() if settings.cpu_offload and device.type == "cuda" else OffloadPolicy()
        # torch keeps what it worked out for a mesh, and takes a later one of the same names and shape for the same:
        # without a number a second run in these processes is handed groups of the first, which are gone.
        self._number = next(_MESHES)
        self._mesh = self._made_mesh()
        self._roots: list[nn.Module] = []
        self._split: dict[int, list[nn.Module]] = {}

    def _made_mesh(self) -> DeviceMesh:
        sizes = {_REPLICAS: self.replicas, _SHARDS: self.size, _SPLIT: self.parts}
        used = {self._named(name): size for name, size in sizes.items() if size > 1 or name == _SHARDS}
        return init_device_mesh(self.device.type, tuple(used.values()), mesh_dim_names=tuple(used))

    def _named(self, dimension: str) -> str:
        return f"{dimension}-{self._number}"

    @property
    def _data_mesh(self) -> DeviceMesh:
        """The processes that see other rows than this one."""
        shards = self._named(_SHARDS)
        return self._mesh[self._named(_REPLICAS), shards] if self.replicas > 1 else self._mesh[shards]

    def cut(self, root: nn.Module, half: Callable[[str], torch.dtype | None]) -> None:
        """Takes a model on the CPU to the device, share by share, in place. half: the number format that a parameter
        computes in, by name, None for its own. A model without layers of its own stays as it is, on the device.
        """
        layers = _sharded_layers(root)
        if not layers:
            root.to(self.device)
            return
        if self.parts > 1:
            self._split[id(root)] = split_layers(root, self._mesh[self._named(_SPLIT)])
        formats = {half(name) for name, _ in root.named_parameters()} - {None}
        assert len(formats) <= 1, formats
        # Whatever keeps its own format stands apart: a policy is that of all parameters that are gathered together.
        apart = [module for name, module in root.named_modules() if formats and _stands_apart(name, module, half)]
        policy = MixedPrecisionPolicy(
            param_dtype=next(iter(formats), None), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for module in apart:
            self._cut(module, MixedPrecisionPolicy(cast_forward_inputs=False), reshards=self._reshards)
        for layer in layers:
            self._cut(layer, policy, reshards=self._reshards)
        self._cut(root, policy, reshards=False)
        # The root must be known before any layer runs by itself.
        fully_shard.state(root)._lazy_init()  # type: ignore[attr-defined]  # torch names no public way
        self._roots.append(root)

    def _cut(self, module: nn.Module, policy: MixedPrecisionPolicy, *, reshards: bool) -> None:
        sharded = fully_shard(
            module, mesh=self._data_mesh, reshard_after_forward=reshards, mp_policy=policy, offload_policy=self._offload
        )
        # Sums, as everywhere: the loss is divided by its count over all processes before the backward pass.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    def summary(self) -> str:
        """How, in words."""
        copies = "one copy" if self.replicas == 1 else f"{self.replicas} copies"
        groups = "processes" if self.parts == 1 else f"groups of {self.parts} processes that split its layers"
        unused = f"; distributed.cpu_offload has no effect on {self.device.type}" if self._unused else ""
        return f"{copies} shared out over {self.size} {groups}" + (" each" if self.replicas > 1 else "") + unused

    def rows_of(self, shape: Sequence[int], split: int | None = None) -> Rows:
        """This process's share of a parameter of this shape. split: the dimension that tensor parallelism splits."""
        length = shape[0] // self.parts if split == 0 else shape[0]
        before = self.part * length if split == 0 else 0
        most = -(-length // self.size)
        first = min(self.rank * most, length)
        columns = None
        if split == 1:
            width = shape[1] // self.parts
            columns = (self.part * width, width)
        copies = self.replicas * (self.parts if split is None else 1)
        return Rows(before + first, min(first + most, length) - first, tuple(shape), columns, copies)

    def share_of(self, parameter: Tensor) -> Rows:
        """This process's share of a parameter of a model that has been cut."""
        return self.rows_of(parameter.shape, _split_of(parameter))

    @property
    def file(self) -> tuple[int, int]:
        """(number, files): which of the files of one copy is this process's."""
        return self.rank * self.parts + self.part, self.size * self.parts

    def writes(self, rows: Rows | None) -> bool:
        """Whether, of the processes with one copy, this one puts these rows into its file: what the processes of a
        group all have is in one file, and so is what is the same on all (None).
        """
        return self.file[0] == 0 if rows is None else self.part == 0 or rows.copies == self.replicas

    def begin(self) -> None:
        """To be called before a step, and before shares are written to: lets go of whatever is whole, and forgets
        passes without gradients, in whose order a backward pass would fetch layers ahead.
        """
        for root in self._roots:
            assert isinstance(root, FSDPModule)
            root.reset_iter_state()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, every process holds all weights of all models, and may run them alone. They must not change."""
        units = [module for root in self._roots for module in root.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            self.begin()
            for unit in units:
                is_root = any(unit is root for root in self._roots)
                unit.set_reshard_after_forward(self._reshards and not is_root, recurse=False)

    def refresh(self) -> None:
        """To be called after the set of parameters that train has changed."""
        with self.whole():
            pass

    @torch.no_grad()
    def gather(self, root: nn.Module) -> None:
        """Ends the sharing of `root`: its parameters become whole ones on the CPU of the first process, one after
        another, and empty ones on the others. It runs no more on those.
        """
        self.begin()
        self._roots = [kept for kept in self._roots if kept is not root]
        for module in root.modules():
            if isinstance(module, FSDPModule):
                _end_hooks(module)
        replaced: dict[int, nn.Parameter] = {}
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = self._gathered(parameter)
                setattr(module, name, replaced[id(parameter)])
        whole_again(self._split.pop(id(root), []))
        root.to("cpu")

    def _gathered(self, parameter: nn.Parameter) -> nn.Parameter:
        assert isinstance(parameter, DTensor)
        full = parameter.full_tensor()
        kept = full.cpu() if self._world.is_first else full.new_empty(0, device="cpu")
        return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def sharding_for(world: World, device: torch.device, *, needed: int, optimizer: str) -> tuple[Sharding | None, str]:
    """What `distributed.mode` asks for, None for a model that is whole on each process, and why, in words.

    needed: bytes of weights, gradients and optimizer on a process that holds them all. "auto" shares a model out where
    that is more than half of the memory that a process has for itself (the other half is for activations). Raises
    `UserError` as `Sharding`.
    """
    settings = world.settings
    if world.size == 1:
        return None, ""
    if settings.mode == "replicate":
        return _in_copies(world, device)
    if settings.mode == "shard":
        sharding = Sharding(settings, world, device)
        return sharding, sharding.summary()
    # The same on every process, whatever each host has.
    memory = min(size for size in world.gather(_memory(device)) if isinstance(size, int))
    told = f"{needed / _GIB:.3g} GiB of weights, gradients and optimizer, {memory / _GIB:.3g} GiB of memory a process"
    if needed / settings.tensor_parallel <= memory / 2:
        copies, summary = _in_copies(world, device)
        return copies, f"{summary} ({told})"
    if optimizer in WHOLE_MATRICES:
        return None, f"a copy on each of {world.size} processes, which {optimizer} needs ({told})"
    sharding = Sharding(settings, world, device)
    return sharding, f"{sharding.summary()} ({told})"


def _in_copies(world: World, device: torch.device) -> tuple[Sharding | None, str]:
    """A whole model on each process, or on each group of those that split its layers."""
    if world.settings.tensor_parallel == 1:
        return None, f"a copy on each of {world.size} processes"
    sharding = Sharding(world.settings, world, device, shares=False)
    return sharding, sharding.summary()


def _memory(device: torch.device) -> int:
    """Bytes that a process has: its GPU's, or its part of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // here


def _split_of(parameter: Tensor) -> int | None:
    """The dimension that tensor parallelism splits."""
    assert isinstance(parameter, DTensor), type(parameter)
    for name, placement in zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True):
        if name.startswith(_SPLIT) and isinstance(placement, Shard):
            return int(placement.dim)
    return None


def _sharded_layers(root: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules, those without parameters left out."""
    found: list[nn.Module] = []
    for child in root.children():
        members = list(child) if isinstance(child, nn.ModuleList) else _sharded_layers(child)
        found += [member for member in members if next(member.parameters(), None) is not None]
    return found


def _stands_apart(name: str, module: nn.Module, half: Callable[[str], torch.dtype | None]) -> bool:
    own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
    return bool(own and name) and all(half(parameter) is None for parameter in own)


def _end_hooks(module: FSDPModule) -> None:
    """Takes out what gathers the module's parameters when it runs, and its class with it."""
    state = fully_shard.state(module)  # type: ignore[attr-defined]  # as torch's own tests reach it
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    assert isinstance(module, nn.Module)
    module.__class__ = type(module).__mro__[FSDPModule._orig_cls_mro_index]
