"""The global random states of one process as tensors and JSON, never as pickle.

Covers Python's `random`, NumPy's global generator, and torch on the CPU and on every CUDA or MPS device. Generators
that a caller creates are not included; a data cursor saves its own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from loopos.storage.durable import JSON


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seeds every global generator; each rank gets a different seed."""
    random.seed(seed + rank)
    numpy.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def random_states() -> tuple[dict[str, torch.Tensor], dict[str, JSON]]:
    """All global random states of this process, as (tensors, state) ready for `checkpoint.save`."""
    version, words, next_gauss = random.getstate()
    generator: dict[str, Any] = numpy.random.get_state(legacy=False)
    assert generator["bit_generator"] == "MT19937", "NumPy's global generator was replaced by another kind"
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(generator["state"]["key"].astype(numpy.int64)),
        "torch_cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        for index, device_state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"torch_cuda_{index}"] = device_state
    if torch.backends.mps.is_available():
        tensors["torch_mps"] = torch.mps.get_rng_state()
    state: dict[str, JSON] = {
        "python_version": version,
        "python_next_gauss": next_gauss,
        "numpy_position": int(generator["state"]["pos"]),
        "numpy_has_gauss": int(generator["has_gauss"]),
        "numpy_gauss": float(generator["gauss"]),
    }
    return tensors, state


def restore_random_states(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> list[str]:
    """Restores the states of `random_states`. Returns one line per device that only the checkpoint or only this machine
    has, and per generator whose saved state this version of Python, NumPy or torch does not accept.

    An empty list means that all later draws equal those of the uninterrupted run.
    """
    lines = []
    for name, restore in (("python", _restore_python), ("numpy", _restore_numpy), ("torch_cpu", _restore_torch)):
        try:
            restore(tensors, state)
        except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as problem:
            first = (str(problem).splitlines() or [""])[0]
            lines.append(
                f"the random state of {name} in the checkpoint is not one of this version ({type(problem).__name__}: "
                f"{first}); it starts from the seed, and the run will not equal the uninterrupted one bit for bit"
            )
    return lines + _restore_devices(tensors)


def _restore_python(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    words = tuple(tensors["python"].tolist())
    random.setstate((state["python_version"], words, state["python_next_gauss"]))


def _restore_numpy(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    numpy.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(numpy.uint32), "pos": state["numpy_position"]},
            "has_gauss": state["numpy_has_gauss"],
            "gauss": state["numpy_gauss"],
        }
    )


def _restore_torch(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    torch.set_rng_state(tensors["torch_cpu"])


def _restore_devices(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    saved = {name for name in tensors if name.startswith(("torch_cuda_", "torch_mps"))}
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = {f"torch_cuda_{index}" for index in range(num_cuda)}
    if torch.backends.mps.is_available():
        present.add("torch_mps")
    for name in saved & present:
        # A copy on the CPU: the loaded tensor may be a read-only map of the file.
        device_state = tensors[name].cpu().clone()
        if name == "torch_mps":
            torch.mps.set_rng_state(device_state)
        else:
            torch.cuda.set_rng_state(device_state, int(name.removeprefix("torch_cuda_")))
    absent = [
        f"the checkpoint has a random state for {name}, which this machine lacks" for name in sorted(saved - present)
    ]
    fresh = [
        f"the checkpoint has no random state for {name}, which this machine has" for name in sorted(present - saved)
    ]
    return absent + fresh
