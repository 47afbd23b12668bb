"""DINOv2 (arXiv 2304.07193): ViT with a factor per coordinate behind each branch.

Its class stores the width of the MLP as a ratio to the hidden size.
"""

from typing import Any

from ..core.anatomy import Anatomy, Config, Part, linear, norm
from ..errors import RegraftError
from . import vit
from .bert import base_prefix, head_defaults, head_linear
from .vit import LAYER

HEADS = {"Dinov2Model": "", "Dinov2Backbone": "", "Dinov2ForImageClassification": "classifier"}
# LayerScale: the output of each branch is multiplied by learned factors.
ATTN: dict[str, Any] = {"bias": True, "scaled": "scale.attn.weight"}
MLP: dict[str, Any] = {"bias": True, "scaled": "scale.mlp.weight"}
PLAIN: dict[str, Any] = {"unless": "use_swiglu_ffn"}
GATED: dict[str, Any] = {"when": "use_swiglu_ffn"}


def compute_mlp_width(hidden: int, ratio: float, gated: bool) -> int:
    """The MLP's width, as the class computes it from `mlp_ratio`.

    A gated MLP has a third matrix, so it takes two thirds of the width, rounded up to a multiple
    of 8.
    """
    units = int(hidden * ratio)
    return (int(units * 2 / 3) + 7) // 8 * 8 if gated else units


def mlp_width(config: Config) -> int:
    """The MLP's width of a config."""
    return compute_mlp_width(config["hidden_size"], config["mlp_ratio"], config["use_swiglu_ffn"])


def derived_config_keys(config: Config) -> dict[str, Any]:
    """The `mlp_ratio` that gives the new width, and the stage names of the new depth.

    RegraftError when no whole ratio gives the width.
    """
    hidden, ffn, gated = config["hidden_size"], config["_ffn"], config["use_swiglu_ffn"]
    # Width -> ratio, for whole ratios until well above the width wanted.
    widths = {
        compute_mlp_width(hidden, ratio, gated): ratio for ratio in range(1, 2 * ffn // hidden + 3)
    }
    if mlp_width(config) != ffn and ffn not in widths:
        near = min(size for size in widths if size > ffn)  # smaller ones may be below the source's
        raise RegraftError(
            f"dinov2 keeps its MLP's width as a whole mlp_ratio: hidden {hidden} cannot have "
            f"ffn {ffn}, use --ffn {near}"
        )

    # A ratio that fits stays, even one that is no whole number.
    ratio = config["mlp_ratio"] if mlp_width(config) == ffn else widths[ffn]
    return {"mlp_ratio": ratio} | backbone_stage_keys(config)


def backbone_stage_keys(config: Config) -> dict[str, Any]:
    """Stages of a backbone, whose features it gives: a stage ends where its layer ends.

    Stage 0 is the embedding, stage k the layer k. Layers after the source's last one, whose order
    is not given, take its place.
    """
    names = ["stem", *(f"stage{layer + 1}" for layer in range(config["num_hidden_layers"]))]
    order = config.get("_order", range(len(config.get("stage_names") or names) - 1))
    # Identity layers stand behind the layer that they come from and belong to its stage.
    ends = {0: 0}
    for place, layer in enumerate(order):
        if ends.get(layer + 1, place) == place:
            ends[layer + 1] = place + 1
    ends[len(ends) - 1] = len(names) - 1

    keys: dict[str, Any] = {}
    if config.get("stage_names") is not None:
        keys["stage_names"] = names
    if (indices := config.get("out_indices")) is not None:
        keys["out_indices"] = [ends.get(stage, stage) for stage in indices]  # negative ones stay
    if (features := config.get("out_features")) is not None:
        stages = {f"stage{stage}": f"stage{end}" for stage, end in ends.items()}
        keys["out_features"] = [stages.get(name, name) for name in features]
    return keys


anatomy = Anatomy(
    family="dinov2",
    parts={
        **vit.embedding_parts(),
        "mask.weight": Part("{p}embeddings.mask_token", "one hidden", when="use_mask_token"),
        **norm("norm.attn", f"{LAYER}.norm1", bias=True),
        **vit.qkv_parts(),
        **linear("attn.o", f"{LAYER}.attention.output.dense", "kv dim -> hidden", **ATTN),
        "scale.attn.weight": Part(f"{LAYER}.layer_scale1.lambda1", "scale hidden", reads="own"),
        **norm("norm.mlp", f"{LAYER}.norm2", bias=True),
        **linear("mlp.up", f"{LAYER}.mlp.fc1", "hidden -> ffn", bias=True, **PLAIN),
        **linear("mlp.down", f"{LAYER}.mlp.fc2", "ffn -> hidden", **MLP, **PLAIN),
        **linear(
            "mlp.swiglu.gate_up",
            f"{LAYER}.mlp.weights_in",
            "hidden -> ffn + ffn",
            bias=True,
            fused=("mlp.swiglu.gate", "mlp.swiglu.up"),
            **GATED,
        ),
        **linear("mlp.swiglu.down", f"{LAYER}.mlp.weights_out", "ffn -> hidden", **MLP, **GATED),
        "scale.mlp.weight": Part(f"{LAYER}.layer_scale2.lambda1", "scale hidden", reads="own"),
        **norm("norm.final", "{p}layernorm", bias=True),
        **head_linear(
            "classifier", "classifier", "two hidden -> label", "_classifier", reads="normed"
        ),
    },
    sizes=(*vit.SIZES, ("_ffn", "ffn")),
    slot=f"{LAYER}.attention",
    defaults={
        "patch_size": 14,
        **vit.DEFAULTS,
        "mlp_ratio": 4,
        "use_swiglu_ffn": False,
        "use_mask_token": True,
        "layer_norm_eps": 1e-6,
        "_ffn": mlp_width,
        **head_defaults(HEADS),
    },
    fixed={"group": 1},
    eps="layer_norm_eps",
    rotary=False,
    finish=derived_config_keys,
    prefix=base_prefix(HEADS, "dinov2."),
    causal=False,
    inputs="pixels",
)
