"""The random states of one process enter and leave as tensors and JSON, never as pickle.

Python's `random`, NumPy's global generator, torch on the CPU and on every CUDA or MPS device there is. Left out:
generators that a caller made for itself (a data cursor saves its own).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from loopos.storage.durable import JSON


def seed_everything(seed: int, rank: int = 0) -> None:
    """Starts every global generator from `seed`; ranks draw apart from each other."""
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
    """Put back what `random_states` gave; returns one line for each saved or present device without a match, and for
    each generator whose state another version of Python, NumPy or torch wrote in a form that this one does not take.

    An empty list means that every draw from here on equals the one that would have followed the save.
    """
    lines = []
    for name, restore in (("python", _restore_python), ("numpy", _restore_numpy), ("torch_cpu", _restore_torch)):
        try:
            restore(tensors, state)
        except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as problem:
            first = (str(problem).splitlines() or [""])[0]
            lines.append(
                f"the random state of {name} in the checkpoint is not one of this version ({type(problem).__name__}: "
                f"{first}); it starts from the seed, and the run does not repeat the uninterrupted one to the bit"
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
        # A CPU byte tensor of its own: the loaded one may be a read-only map of the file.
        device_state = tensors[name].cpu().clone()
        if name == "torch_mps":
            torch.mps.set_rng_state(device_state)
        else:
            torch.cuda.set_rng_state(device_state, int(name.removeprefix("torch_cuda_")))
    absent = [f"the checkpoint holds a random state for {name}, which is not here" for name in sorted(saved - present)]
    fresh = [f"the checkpoint holds no random state for {name}, which is here" for name in sorted(present - saved)]
    return absent + fresh
