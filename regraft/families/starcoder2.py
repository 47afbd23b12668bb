"""StarCoder2 (arXiv 2402.19173): Llama's attention with layer norms and a plain MLP.

Every map may have a bias.
"""

from ..core.anatomy import Anatomy, linear, norm
from ..core.part import TIED_HEAD
from .llama import DEFAULTS, LAYER, SIZES, attention_parts

ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"

anatomy = Anatomy(
    family="starcoder2",
    parts={
        **linear("embed", "model.embed_tokens", "vocab -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.input_layernorm", bias=True),
        **attention_parts("use_bias", "use_bias"),
        **norm("norm.mlp", f"{LAYER}.post_attention_layernorm", bias=True),
        **linear("mlp.up", f"{MLP}.c_fc", "hidden -> ffn", bias="use_bias"),
        **linear("mlp.down", f"{MLP}.c_proj", "ffn -> hidden", bias="use_bias"),
        **norm("norm.final", "model.norm", bias=True, writes="head"),
        "head.weight": TIED_HEAD,
    },
    sizes=SIZES,
    slot=ATTENTION,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "use_bias": True,
        "norm_epsilon": 1e-5,
    },
    eps="norm_epsilon",
)
