"""What tensors are called in a table, from their names in a class."""

from __future__ import annotations

import re

ATTENTION = r"(?:attn|attention|mixer)"
# Role -> regular expression over the name of a module. The first that fits counts.
PATTERNS = {
    "attn.q_norm": rf"{ATTENTION}.*\.(q_norm|q_ln|q_layernorm|query_layernorm|norm_q)",
    "attn.k_norm": rf"{ATTENTION}.*\.(k_norm|k_ln|k_layernorm|key_layernorm|norm_k)",
    "attn.qkv": rf"{ATTENTION}.*\.(qkv|c_attn|query_key_value|Wqkv|qkv_proj)",
    "attn.q": rf"{ATTENTION}.*\.(q_proj|query|q_lin|wq|Wq|q)",
    "attn.k": rf"{ATTENTION}.*\.(k_proj|key|k_lin|wk|Wk|k)",
    "attn.v": rf"{ATTENTION}.*\.(v_proj|value|v_lin|wv|Wv|v)",
    "attn.o": rf"{ATTENTION}.*\.(o_proj|out_proj|dense|c_proj|out_lin|wo|Wo)",
    "mlp.gate_up": r".*\.(gate_up_proj|input_linear|mlp\.Wi)",
    "mlp.gate": r".*\.(gate_proj|w1|c_fc_0)",
    "mlp.up": r".*\.(up_proj|w3|fc1|fc_in|c_fc|c_fc_1|dense_h_to_4h|ffn\.0"
    r"|intermediate\.dense|lin1)",
    "mlp.down": r".*\.(down_proj|w2|fc2|fc_out|c_proj|dense_4h_to_h|ffn\.2|output\.dense|lin2"
    r"|output_linear|mlp\.Wo)",
    "mlp.router": r".*\.(gate|router|gate\.wg|router\.layer)",
}
# What parameters are called that hold a logit of each head beside its scores.
SINKS = ("sinks", "sink", "softmax_offset")
# Of experts that all tokens go to; Zamba's layers share a whole block.
SHARED = r"shared(?!_transf)"
HEAD = r"(lm_head|embed_out|output_projection|output)"


def find_role(module: str, ending: str = "weight") -> str | None:
    """The role of a tensor by the name of its module; None when the name does not say.

    Args:
        module: name with "{}" for the layer and "{e}" for the expert.
        ending: of the tensor's name.
    """
    if "{}" not in module:
        return "head" if re.fullmatch(rf"(.*\.)?{HEAD}", module) else None
    # Some classes wrap each map in a module of its own.
    inside = module.partition("{}")[2].removesuffix(".linear")
    if ending in SINKS and re.search(ATTENTION, inside):
        return "attn.sinks"
    for role, pattern in PATTERNS.items():
        if re.fullmatch(rf".*{pattern}" if role.startswith("attn.") else pattern, inside):
            if role.startswith("mlp.") and re.search(r"attn|attention", inside):
                return None
            if role.startswith("mlp.") and re.search(SHARED, inside):
                return f"shared.{role.removeprefix('mlp.')}"
            return role.replace("mlp.", "mlp.{e}.") if "{e}" in module else role
    return None


def find_named_role(template: str) -> str | None:
    """The role of a tensor by the name of its module, or by its own where that says more.

    Args:
        template: its name, such as "model.layers.{}.experts.gate_up_proj".
    """
    module, _, ending = template.partition("#")[0].rpartition(".")
    role = find_role(module, ending)
    if role is not None or ending in ("weight", "bias"):
        return role
    return find_role(f"{module}.{ending.removesuffix('_bias')}")


def find_attention(module: str) -> str:
    """The name of the attention module that a module is in, up to the first part that says so."""
    parts = module.split(".")
    first = next((i for i, part in enumerate(parts) if re.search(ATTENTION, part)), len(parts) - 1)
    return ".".join(parts[: first + 1])


def name_rest(module: str) -> str:
    """The role of a tensor that no pattern fits: its own name, in a layer that inside it."""
    inside = f"{module}.".rpartition("{}.")[2].rstrip(".")
    return "other." + (inside or "layer").replace(".", "_")
