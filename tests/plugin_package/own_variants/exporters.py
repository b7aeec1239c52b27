"""An export format."""

import json

from loopos import register_exporter


@register_exporter("plain_numbers", types=("f32",))
def plain_numbers(folder, out, number_type):
    """One JSON file a tensor, as nested lists."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        (out / f"{name}.json").write_text(json.dumps(tensor.float().tolist()))
    return [f"{len(tensors)} tensors as {number_type}"]
