"""Checkpoints: exact round trips, error messages for every kind of damage, full disks, pruning, random states."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from loopos.config.diagnostics import UserError
from loopos.storage.durable import StorageError
from loopos.storage.tensor_files import DTYPE_NAMES, safetensors_chunks
from loopos.training import checkpoint


def tiny(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "weights": {"head.weight": torch.full((3, 4), value), "head.bias": torch.zeros(3)},
        "optimizer": {"head.weight.momentum": torch.full((3, 4), -value)},
    }


def save_tiny(root: Path, step: int, *, is_best: bool = False) -> Path:
    return checkpoint.save(root, step, tiny(step), {"cursor": {"epoch": 1, "row": step}}, metric=0.5, is_best=is_best)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_round_trip_keeps_state_metric_and_flag(tmp_path: Path) -> None:
    state = {"losses": [0.1, 1e-300], "text": "é", "none": None, "yes": True, "pair": (1, 2), "large": 2**70}
    path = checkpoint.save(tmp_path / "new" / "checkpoints", 100, tiny(1.5), state, metric=0.25, is_best=True)
    loaded = checkpoint.load(path)
    assert path.name == "step-00000100"
    assert (loaded.step, loaded.metric, loaded.is_best, loaded.path) == (100, 0.25, True, path)
    assert loaded.state == {**state, "pair": [1, 2]}
    assert {group: sorted(members) for group, members in loaded.tensors.items()} == {
        "weights": ["head.bias", "head.weight"],
        "optimizer": ["head.weight.momentum"],
    }
    assert torch.equal(loaded.tensors["optimizer"]["head.weight.momentum"], torch.full((3, 4), -1.5))
    assert sorted(entry.name for entry in path.iterdir()) == [
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]


def test_loaded_tensors_may_be_written_to_without_changing_the_file(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, 1)
    checkpoint.load(path).tensors["weights"]["head.weight"].zero_()
    assert checkpoint.load(path).tensors["weights"]["head.weight"][0, 0] == 1.0


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=str)
def test_every_dtype_keeps_its_exact_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    width = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * width,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype).reshape(2, 3)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 0, {"any": {"t": tensor}}, {})).tensors["any"]["t"]
    assert loaded.dtype == dtype
    assert loaded.shape == (2, 3)
    assert bits(loaded) == bits(tensor)


def test_views_scalars_and_empty_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    group = {"transposed": base.T, "slice": base[1:3, ::2], "row": base[2], "expanded": base[:1, :1].expand(2, 2)}
    group |= {"scalar": torch.tensor(7), "empty": torch.empty(0, 5), "bool": torch.tensor([True, False, True])}
    group |= {"parameter": torch.nn.Parameter(torch.ones(2))}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 0, {"weights": group, "nothing": {}}, {})).tensors
    assert loaded["nothing"] == {}
    assert len(loaded["weights"]) == 8
    for name, tensor in group.items():
        # torch.equal compares shapes too.
        assert torch.equal(loaded["weights"][name], tensor), name


def test_our_safetensors_bytes_hold_what_the_packages_own_writer_holds() -> None:
    group = {"b": torch.arange(5, dtype=torch.int8), "a": torch.randn(3, 3), "c": torch.ones(2, dtype=torch.bfloat16)}
    actual_bytes = b"".join(bytes(chunk) for chunk in safetensors_chunks(group))
    expected_bytes = safetensors_save(group, metadata={"format": "pt"})
    assert len(actual_bytes) == len(expected_bytes)
    assert {name: bits(tensor) for name, tensor in safetensors_load(actual_bytes).items()} == {
        name: bits(tensor) for name, tensor in safetensors_load(expected_bytes).items()
    }


def test_large_tensors_are_written_in_chunks_without_a_full_copy() -> None:
    tensor = torch.arange(3 * 2**20, dtype=torch.float32)
    chunks = list(safetensors_chunks({"t": tensor}))
    assert [len(chunk) for chunk in chunks[1:]] == [4 * 2**20] * 3
    tensor[0] = 99.0
    assert bytes(chunks[1][:4]) == numpy.float32(99.0).tobytes()


def test_manifest_gives_each_files_size_and_hash(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["metric"], manifest["is_best"]) == (1, 3, 0.5, False)
    assert len(manifest["files"]) == 3
    for name, record in manifest["files"].items():
        content = (path / name).read_bytes()
        assert record == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = save_tiny(tmp_path / "a", 5), save_tiny(tmp_path / "b", 5)
    names = sorted(entry.name for entry in first.iterdir())
    assert len(names) == 4
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def rewrite_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def put_folder_in_place_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated weights": (lambda f: truncate(f / "weights.safetensors"), "weights.safetensors", "truncated"),
    "emptied state": (lambda f: os.truncate(f / "state.json", 0), "state.json", "truncated"),
    "longer state": (lambda f: os.truncate(f / "state.json", 9999), "state.json", "longer"),
    "bit of weights": (lambda f: flip_bit(f / "weights.safetensors", -1), "weights.safetensors", "SHA-256"),
    "bit of header": (lambda f: flip_bit(f / "optimizer.safetensors", 0), "optimizer.safetensors", "SHA-256"),
    "bit of state": (lambda f: flip_bit(f / "state.json", 5), "state.json", "SHA-256"),
    "missing weights": (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors", "missing"),
    "missing state": (lambda f: (f / "state.json").unlink(), "state.json", "missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json", "missing"),
    "cut manifest": (lambda f: truncate(f / "manifest.json"), "manifest.json", "not readable as JSON"),
    "binary manifest": (lambda f: (f / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json", "not readable"),
    "list manifest": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json", "expected an object"),
    "other format": (lambda f: rewrite_manifest(f, format=2), "manifest.json", "format 2"),
    "changed metric": (lambda f: rewrite_manifest(f, metric=0.75), "manifest.json", "SHA-256"),
    "forgotten file": (lambda f: rewrite_manifest(f, files={}), "manifest.json", "SHA-256"),
    "folder for file": (lambda f: put_folder_in_place_of(f / "manifest.json"), "manifest.json", "not readable"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_newest_whole_is_used(tmp_path: Path, damage: str) -> None:
    inflict, file, problem = DAMAGES[damage]
    for step in (10, 20, 30):
        save_tiny(tmp_path, step)
    newest = tmp_path / "step-00000030"
    inflict(newest)
    with pytest.raises(checkpoint.CheckpointError, match=problem) as caught:
        checkpoint.load(newest)
    assert str(newest / file) in str(caught.value)
    assert isinstance(caught.value, UserError)
    found, summary = checkpoint.newest_whole(tmp_path)
    assert found is not None
    assert found.step == 20
    assert torch.equal(found.tensors["weights"]["head.weight"], torch.full((3, 4), 20.0))
    assert len(summary) == 2
    assert str(newest / file) in summary[0]
    assert problem in summary[0]
    assert "step-00000020" in summary[1]


def test_no_flipped_bit_of_a_manifest_passes_for_another_content(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, 12)
    original = (path / "manifest.json").read_bytes()
    num_rejected = 0
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1 << (position % 8)
        (path / "manifest.json").write_bytes(changed)
        try:
            loaded = checkpoint.load(path)
        except checkpoint.CheckpointError:
            num_rejected += 1
        else:
            # Only a blank between two values may change unnoticed.
            assert (loaded.step, loaded.metric, loaded.is_best, loaded.state["cursor"]["row"]) == (12, 0.5, False, 12)
            assert original[position : position + 1].isspace()
    assert num_rejected > 0.8 * len(original)


def test_a_moved_folder_is_rejected(tmp_path: Path) -> None:
    os.rename(save_tiny(tmp_path, 10), tmp_path / "step-00000099")
    found, summary = checkpoint.newest_whole(tmp_path)
    assert found is None
    assert len(summary) == 1
    assert "has step 10" in summary[0]
    assert "step-00000099" in summary[0]


def test_each_of_several_damaged_checkpoints_is_reported(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_tiny(tmp_path, step)
    for step in (2, 3, 4):
        (tmp_path / f"step-0000000{step}" / "state.json").unlink()
    found, summary = checkpoint.newest_whole(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [f"step-0000000{step}" in line for step, line in zip((4, 3, 2, 1), summary, strict=True)] == [True] * 4


def test_newest_whole_of_nothing(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path / "absent") == (None, [])
    assert checkpoint.best(tmp_path / "absent") is None
    (tmp_path / "step-notes").mkdir()
    assert checkpoint.newest_whole(tmp_path) == (None, [])


def test_steps_of_more_than_eight_digits_are_newest(tmp_path: Path) -> None:
    save_tiny(tmp_path, 99_999_999)
    save_tiny(tmp_path, 100_000_000)
    found, _ = checkpoint.newest_whole(tmp_path)
    assert found is not None
    assert found.step == 100_000_000


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_partial_folders_of_dead_processes_are_reported_and_then_cleared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, 1)
    dead = tmp_path / f".step-00000002.partial-{ended_process()}"
    own = tmp_path / f".step-00000003.partial-{os.getpid()}"
    alive = tmp_path / f".step-00000002.partial-{os.getppid()}"
    for folder in (dead, own, alive):
        shutil.copytree(tmp_path / "step-00000001", folder)
    found, summary = checkpoint.newest_whole(tmp_path)
    assert found is not None
    assert found.step == 1
    assert sum("half-written" in line for line in summary) == 3
    save_tiny(tmp_path, 2)
    assert not dead.exists()
    assert not own.exists()
    assert alive.exists()
    assert {str(dead), str(own)} == {message.split(": ")[0] for message in caplog.messages}


def test_a_checkpoint_caught_between_the_renames_is_found_and_put_back(tmp_path: Path) -> None:
    save_tiny(tmp_path, 1)
    caught = tmp_path / f".step-00000002.replaced-{ended_process()}"
    os.rename(save_tiny(tmp_path, 2), caught)
    found, summary = checkpoint.newest_whole(tmp_path)
    assert found is not None
    assert (found.step, found.path, summary) == (2, caught, [])
    assert len(checkpoint.sweep(tmp_path)) == 1
    found, _ = checkpoint.newest_whole(tmp_path)
    assert found is not None
    assert found.path == tmp_path / "step-00000002"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_tiny(tmp_path, 7)
    checkpoint.save(tmp_path, 7, {"weights": {"other": torch.ones(1)}}, {"second": True})
    found, summary = checkpoint.newest_whole(tmp_path)
    assert found is not None
    assert found.state == {"second": True}
    assert list(found.tensors) == ["weights"]
    assert summary == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000007"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5])
def test_full_disk_is_one_line_and_leaves_the_previous_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fails_at: int
) -> None:
    save_tiny(tmp_path, 1)
    num_calls = 0
    real_fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == fails_at:
            raise OSError(code, os.strerror(code))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    state = {"text": "x" * 1000}
    with pytest.raises(checkpoint.DiskFull) as caught:
        checkpoint.save(tmp_path, 2, tiny(2.0), state)
    monkeypatch.undo()
    assert caught.value.exit_code == 74
    message = str(caught.value)
    assert "\n" not in message
    assert "step 2" in message
    # 12 + 3 + 12 floats and {"text": "xxx…"}.
    assert f"needs {27 * 4 + 1012:,} bytes" in message
    assert "bytes, " in message
    assert "are free" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    found, summary = checkpoint.newest_whole(tmp_path)
    assert found is not None
    assert found.step == 1
    assert summary == []


def test_other_system_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError, match=rf"^{tmp_path}/file/checkpoints: Not a directory .*the checkpoint of step 1"
    ):
        save_tiny(tmp_path / "file" / "checkpoints", 1)


def test_an_interrupted_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_tiny(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_nonfinite_weights_are_not_saved(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(3, 5)
    bad[1, 2] = value
    with pytest.raises(checkpoint.NonFiniteError, match=r"1 of 2 weights.*: bad$"):
        checkpoint.save(tmp_path / "root", 1, {"weights": {"good": torch.ones(2), "bad": bad.to(dtype)}}, {})
    assert not (tmp_path / "root").exists()


def test_the_largest_finite_weights_are_saved(tmp_path: Path) -> None:
    group = {
        str(dtype): torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
        for dtype in DTYPE_NAMES
        if dtype.is_floating_point
    }
    assert len(group) == 6
    assert len(checkpoint.load(checkpoint.save(tmp_path, 1, {"weights": group}, {})).tensors["weights"]) == 6


def test_state_that_json_would_change_is_a_programming_error(tmp_path: Path) -> None:
    for state in ({"a": [{1: "one"}]}, {"a": {None: 0}}):
        with pytest.raises(AssertionError, match="is not text"):
            checkpoint.save(tmp_path, 1, {}, state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(tmp_path, 1, {}, {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def step_numbers(root: Path) -> list[int]:
    return sorted(int(entry.name.removeprefix("step-")) for entry in root.iterdir())


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "remaining"),
    [(1, True, [20, 50]), (1, False, [50]), (3, True, [20, 30, 40, 50]), (9, False, [10, 20, 30, 40, 50])],
)
def test_prune_keeps_the_last_and_the_best(
    tmp_path: Path, keep_last: int, keep_best: bool, remaining: list[int]
) -> None:
    for step in (10, 20, 30, 40, 50):
        save_tiny(tmp_path, step, is_best=step in (10, 20))
    assert checkpoint.best(tmp_path) == tmp_path / "step-00000020"
    removed = checkpoint.prune(tmp_path, keep_last, keep_best)
    assert step_numbers(tmp_path) == remaining
    assert len(removed) == 5 - len(remaining)


def test_prune_does_not_count_damaged_checkpoints(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save_tiny(tmp_path, step, is_best=True)
    truncate(tmp_path / "step-00000040" / "weights.safetensors")
    (tmp_path / "step-00000010" / "state.json").unlink()
    assert checkpoint.best(tmp_path) == tmp_path / "step-00000030"
    assert checkpoint.prune(tmp_path, 1, True) == [tmp_path / "step-00000020", tmp_path / "step-00000010"]
    assert step_numbers(tmp_path) == [30, 40]


def test_prune_removes_nothing_when_nothing_is_whole(tmp_path: Path) -> None:
    for step in (1, 2):
        (save_tiny(tmp_path, step) / "manifest.json").unlink()
    assert checkpoint.prune(tmp_path, 1, False) == []
    assert step_numbers(tmp_path) == [1, 2]


def draws() -> list[object]:
    return [
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
        numpy.random.rand(3).tolist(),
        numpy.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(20).tolist(),
    ]


def test_random_states_continue_exactly_through_a_checkpoint(tmp_path: Path) -> None:
    random.seed(1)
    numpy.random.seed(2)
    torch.manual_seed(3)
    # Gaussians are drawn in pairs: the buffered second one is part of the state.
    random.gauss(0, 1)
    numpy.random.randn()
    torch.randn(1)
    tensors, state = checkpoint.random_states()
    path = checkpoint.save(tmp_path, 1, {"random-rank0": tensors}, {"random": state})
    expected = draws()
    assert draws() != expected
    loaded = checkpoint.load(path)
    assert checkpoint.restore_random_states(loaded.tensors["random-rank0"], loaded.state["random"]) == []
    assert draws() == expected


def test_random_states_of_an_absent_device_are_reported() -> None:
    tensors, state = checkpoint.random_states()
    tensors["torch_cuda_63"] = torch.zeros(16, dtype=torch.uint8)
    summary = checkpoint.restore_random_states(tensors, state)
    assert len(summary) == 1
    assert "torch_cuda_63" in summary[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_tensors_and_random_states_of_cuda(tmp_path: Path) -> None:
    torch.cuda.manual_seed_all(5)
    tensors, state = checkpoint.random_states()
    weights = torch.randn(64, 64, device="cuda")
    path = checkpoint.save(tmp_path, 1, {"weights": {"w": weights.T}, "random": tensors}, {"random": state})
    loaded = checkpoint.load(path)
    assert torch.equal(loaded.tensors["weights"]["w"], weights.T.cpu())
    assert checkpoint.restore_random_states(loaded.tensors["random"], loaded.state["random"]) == []
    assert torch.equal(torch.randn(64, 64, device="cuda"), weights)
