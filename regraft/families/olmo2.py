"""OLMo 2 (arXiv 2501.00656): Llama with norms behind the branches instead of before them.

Query and key norms span all heads together.
"""

from ..core.anatomy import Anatomy, linear, norm
from ..core.part import TIED_HEAD
from .llama import DEFAULTS, LAYER, SIZES

ATTENTION, MLP, BIAS = f"{LAYER}.self_attn", f"{LAYER}.mlp", "attention_bias"

anatomy = Anatomy(
    family="olmo2",
    parts={
        **linear("embed", "model.embed_tokens", "vocab -> hidden", stored="in out"),
        **linear(
            "attn.q", f"{ATTENTION}.q_proj", "hidden -> kv group dim", bias=BIAS, reads="stream"
        ),
        **linear("attn.k", f"{ATTENTION}.k_proj", "hidden -> kv dim", bias=BIAS, reads="stream"),
        **linear("attn.v", f"{ATTENTION}.v_proj", "hidden -> kv dim", bias=BIAS, reads="stream"),
        **norm("attn.q_norm", f"{ATTENTION}.q_norm", "kv group dim"),
        **norm("attn.k_norm", f"{ATTENTION}.k_norm", "kv dim"),
        **linear(
            "attn.o", f"{ATTENTION}.o_proj", "kv group dim -> hidden", bias=BIAS, writes="branch"
        ),
        **norm(
            "norm.attn_post", f"{LAYER}.post_attention_layernorm", reads="branch", writes="stream"
        ),
        **linear("mlp.gate", f"{MLP}.gate_proj", "hidden -> ffn", reads="stream"),
        **linear("mlp.up", f"{MLP}.up_proj", "hidden -> ffn", reads="stream"),
        **linear("mlp.down", f"{MLP}.down_proj", "ffn -> hidden", writes="branch"),
        **norm(
            "norm.mlp_post", f"{LAYER}.post_feedforward_layernorm", reads="branch", writes="stream"
        ),
        **norm("norm.final", "model.norm", writes="head"),
        "head.weight": TIED_HEAD,
    },
    sizes=SIZES,
    slot=ATTENTION,
    defaults={**DEFAULTS, "attention_bias": False, "rms_norm_eps": 1e-5},
)
