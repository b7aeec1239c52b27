"""Sharded training: parameters, gradients and optimizer state are distributed over processes with PyTorch's
`fully_shard` (Zhao et al. 2023), and linear layers are split by tensor parallelism (Shoeybi et al. 2019).

The members of a model's outermost `nn.ModuleList`s are all-gathered one at a time, as they run; everything else
(embeddings, last norm, head) stays gathered for a whole forward and backward pass. Every process must run the same
passes in the same order. `precision.MasterWeights` presents the shards to the optimizer; `slices.py` stores them.
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
    """Splits all models under `root` over `mesh`, in place, by the tensor-parallel plan of transformers. Returns the
    split layers, whose `forward` is replaced.

    `colwise` layers keep a part of the output features, `rowwise` layers a part of the input features. A LoRA adapter
    is split on the same side as its layer. What the plan leaves out (embeddings, norms, heads) is replicated.

    Raises `UserError` for a model without a plan, or of a size that cannot be split.
    """
    split = []
    for model in root.modules():
        # Skip a model with a head: its base model is visited too.
        if isinstance(model, PreTrainedModel) and model.base_model is model:
            for module, style in _planned(model, mesh.size()):
                layer = ALL_PARALLEL_STYLES[style]
                for name, parameter in list(module.named_parameters(recurse=False)):
                    layer.validate_param(module, parameter, mesh, parameter_name=name)
                    layer.shard_param(module, name, mesh)
                layer.install_forward(module, mesh)
                split.append(module)
    return split


def restore_forward(split: list[nn.Module]) -> None:
    """Restores the class's own `forward` of split layers, once their weights are complete again."""
    for module in split:
        del module.forward


def _planned(model: PreTrainedModel, size: int) -> list[tuple[nn.Module, str]]:
    config = model.config.get_text_config()
    plan: dict[str, str] | None = getattr(config, "base_model_tp_plan", None)
    problem = f"distributed.tensor_parallel: got {size} for a model of type {config.model_type}"
    if not plan:
        raise UserError(f"{problem}, for which transformers has no plan; expected tensor_parallel 1, and mode shard")
    for name in _HEADS:
        number = getattr(config, name, size)
        if number % size:
            raise UserError(f"{problem} with {name} {number}; expected a divisor of it")
    found = []
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))
        if style is not None:
            found += list(_split_layers_of(module, style))
    for module, style in found:
        if style in ("colwise", "rowwise"):
            width = getattr(module, "out_features" if style == "colwise" else "in_features", size)
            if width % size:
                raise UserError(f"{problem}, one of whose layers is {width} wide; expected a divisor of it")
    return found


def _split_layers_of(module: nn.Module, style: str) -> Iterator[tuple[nn.Module, str]]:
    """The layer itself, or the one under an adapter and the adapter's matrix on the split side."""
    base = getattr(module, "base_layer", None)
    if not isinstance(base, nn.Module):
        yield module, style
        return
    yield base, style
    if len(getattr(module, "lora_magnitude_vector", ())):
        raise UserError(
            "training.lora.use_dora: got true with distributed.tensor_parallel; expected tensor_parallel 1: the length "
            "of a weight's row needs all of its columns"
        )
    side = module.get_submodule("lora_B" if style == "colwise" else "lora_A")
    for matrix in side.children():
        yield matrix, style


_GIB = 2**30
_REPLICAS, _SHARDS, _SPLIT = "replicate", "shard", "tensor"
_MESHES = itertools.count()


@dataclass(frozen=True)
class Rows:
    """The part of a parameter that a process stores: `count` rows of `shape` from row `first` on. `columns`: first
    column and number of columns, None for all. `copies`: number of processes with the same part.
    """

    first: int
    count: int
    shape: tuple[int, ...]
    columns: tuple[int, int] | None = None
    copies: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """These rows and columns, as a view."""
        assert tuple(whole.shape) == self.shape, (tuple(whole.shape), self.shape)
        rows = whole[self.first : self.first + self.count]
        return rows if self.columns is None else rows.narrow(1, *self.columns)


class Sharding:
    """How the models of a run are sharded. `parts` processes split every layer (tensor parallelism), and this process
    is number `part` of them. `size` such groups share one copy of the model, and `rank` is this group's number. There
    are `replicas` copies.
    """

    def __init__(
        self, settings: DistributedSection, world: World, device: torch.device, *, shards: bool = True
    ) -> None:
        """shards: whether to shard weights beyond the splits of `tensor_parallel`. Raises `UserError` for a
        `shard_size` that does not divide the number of processes or of tensor-parallel groups.
        """
        dp_rank, dp_size = world.data_parallel
        self.parts = world.size // dp_size
        self.part = world.rank % self.parts
        self.size = (settings.shard_size or dp_size) if shards else 1
        if dp_size % self.size:
            groups = "processes" if self.parts == 1 else f"groups of {self.parts} processes"
            raise UserError(
                f"distributed.shard_size: got {self.size} with {dp_size} {groups}; expected a divisor of their number"
            )
        self.replicas, self.rank = dp_size // self.size, dp_rank % self.size
        self.is_first_replica = dp_rank < self.size
        self.device = device
        self._world = world
        self._unused = settings.cpu_offload and device.type != "cuda"
        self._reshards = settings.reshard_after_forward
        self._offload = CPUOffloadPolicy() if settings.cpu_offload and device.type == "cuda" else OffloadPolicy()
        # torch caches process groups by a mesh's names and shape. Without a unique number a second run in these
        # processes would get the groups of the first run, which no longer exist.
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

    def shard(self, root: nn.Module, half: Callable[[str], torch.dtype | None]) -> None:
        """Moves a model from the CPU to the device and shards it, in place. half: the number format in which a
        parameter computes, by name; None for its own. A model without layers is moved but not sharded.
        """
        layers = _sharded_layers(root)
        if not layers:
            root.to(self.device)
            return
        if self.parts > 1:
            self._split[id(root)] = split_layers(root, self._mesh[self._named(_SPLIT)])
        formats = {half(name) for name, _ in root.named_parameters()} - {None}
        assert len(formats) <= 1, formats
        # A policy holds for all parameters that are gathered together, so modules with another format are separate.
        separate = [
            module for name, module in root.named_modules() if formats and _keeps_own_format(name, module, half)
        ]
        policy = MixedPrecisionPolicy(
            param_dtype=next(iter(formats), None), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for module in separate:
            self._shard(module, MixedPrecisionPolicy(cast_forward_inputs=False), reshards=self._reshards)
        for layer in layers:
            self._shard(layer, policy, reshards=self._reshards)
        self._shard(root, policy, reshards=False)
        # The root must be initialized before any layer runs on its own.
        fully_shard.state(root)._lazy_init()  # type: ignore[attr-defined]  # torch has no public function
        self._roots.append(root)

    def _shard(self, module: nn.Module, policy: MixedPrecisionPolicy, *, reshards: bool) -> None:
        sharded = fully_shard(
            module, mesh=self._data_mesh, reshard_after_forward=reshards, mp_policy=policy, offload_policy=self._offload
        )
        # Sums, as everywhere: the loss is divided by its count over all processes before the backward pass.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    def summary(self) -> str:
        """One line that describes the sharding."""
        copies = "one copy" if self.replicas == 1 else f"{self.replicas} copies"
        groups = "processes" if self.parts == 1 else f"groups of {self.parts} processes that split its layers"
        unused = f"; distributed.cpu_offload has no effect on {self.device.type}" if self._unused else ""
        return f"{copies} sharded over {self.size} {groups}" + (" each" if self.replicas > 1 else "") + unused

    def rows_of(self, shape: Sequence[int], split: int | None = None) -> Rows:
        """This process's part of a parameter of this shape. split: the dimension that tensor parallelism splits."""
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

    def local_rows(self, parameter: Tensor) -> Rows:
        """This process's part of a parameter of a sharded model."""
        return self.rows_of(parameter.shape, _split_of(parameter))

    @property
    def file(self) -> tuple[int, int]:
        """(number, files): the number of this process's file among the files of one copy."""
        return self.rank * self.parts + self.part, self.size * self.parts

    def writes(self, rows: Rows | None) -> bool:
        """Whether this process writes these rows to its file. Replicated tensors (None) are written once per copy."""
        return self.file[0] == 0 if rows is None else self.part == 0 or rows.copies == self.replicas

    def begin(self) -> None:
        """Call before a step and before writing to shards. Frees gathered parameters and forgets the order of passes
        without gradients, which a backward pass would use to prefetch layers.
        """
        for root in self._roots:
            assert isinstance(root, FSDPModule)
            root.reset_iter_state()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the context every process has all weights of all models and may run them on its own. The weights must
        not change.
        """
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
        """Call after the set of trainable parameters has changed."""
        with self.whole():
            pass

    @torch.no_grad()
    def gather(self, root: nn.Module) -> None:
        """Ends the sharding of `root`: its parameters become complete on the CPU of rank 0, one after another, and
        empty on the other ranks, where the model can no longer run.
        """
        self.begin()
        self._roots = [other for other in self._roots if other is not root]
        for module in root.modules():
            if isinstance(module, FSDPModule):
                _end_hooks(module)
        replaced: dict[int, nn.Parameter] = {}
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = self._gathered(parameter)
                setattr(module, name, replaced[id(parameter)])
        restore_forward(self._split.pop(id(root), []))
        root.to("cpu")

    def _gathered(self, parameter: nn.Parameter) -> nn.Parameter:
        assert isinstance(parameter, DTensor)
        full = parameter.full_tensor()
        whole = full.cpu() if self._world.is_first else full.new_empty(0, device="cpu")
        return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def sharding_for(world: World, device: torch.device, *, needed: int, optimizer: str) -> tuple[Sharding | None, str]:
    """The sharding for `distributed.mode`, None for a model that is replicated, and one line that explains the choice.

    needed: bytes of weights, gradients and optimizer state of a full copy. Mode "auto" shards if that exceeds half of
    the memory of a process; the other half is for activations. Raises `UserError` as `Sharding` does.
    """
    settings = world.settings
    if world.size == 1:
        return None, ""
    if settings.mode == "replicate":
        return _replicated(world, device)
    if settings.mode == "shard":
        sharding = Sharding(settings, world, device)
        return sharding, sharding.summary()
    # The smallest value of all hosts, so that every process decides the same.
    memory = min(size for size in world.gather(_memory(device)) if isinstance(size, int))
    sizes = f"{needed / _GIB:.3g} GiB of weights, gradients and optimizer, {memory / _GIB:.3g} GiB of memory a process"
    if needed / settings.tensor_parallel <= memory / 2:
        copies, summary = _replicated(world, device)
        return copies, f"{summary} ({sizes})"
    if optimizer in WHOLE_MATRICES:
        return None, f"a copy on each of {world.size} processes, which {optimizer} needs ({sizes})"
    sharding = Sharding(settings, world, device)
    return sharding, f"{sharding.summary()} ({sizes})"


def _replicated(world: World, device: torch.device) -> tuple[Sharding | None, str]:
    """A full copy on each process, or on each tensor-parallel group."""
    if world.settings.tensor_parallel == 1:
        return None, f"a copy on each of {world.size} processes"
    sharding = Sharding(world.settings, world, device, shards=False)
    return sharding, sharding.summary()


def _memory(device: torch.device) -> int:
    """Memory of a process in bytes: of its GPU, or its part of the host's memory."""
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
    """The members of the outermost module lists, without members that have no parameters."""
    found: list[nn.Module] = []
    for child in root.children():
        members = list(child) if isinstance(child, nn.ModuleList) else _sharded_layers(child)
        found += [member for member in members if next(member.parameters(), None) is not None]
    return found


def _keeps_own_format(name: str, module: nn.Module, half: Callable[[str], torch.dtype | None]) -> bool:
    own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
    return bool(own and name) and all(half(parameter) is None for parameter in own)


def _end_hooks(module: FSDPModule) -> None:
    """Removes the hooks that gather the module's parameters, and the class that `fully_shard` gave it."""
    state = fully_shard.state(module)  # type: ignore[attr-defined]  # as torch's own tests reach it
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    assert isinstance(module, nn.Module)
    module.__class__ = type(module).__mro__[FSDPModule._orig_cls_mro_index]
