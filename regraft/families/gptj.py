"""GPT-J (EleutherAI, 2021): one layer norm feeds attention and MLP in parallel.

Neighbouring coordinates of a part of a head turn together.
"""

from ..core.anatomy import Anatomy, Part, linear, norm
from ..core.part import TIED_HEAD
from . import gpt2

LAYER = "transformer.h.{}"

anatomy = Anatomy(
    family="gptj",
    parts={
        **linear("embed", "transformer.wte", "vocab -> hidden", stored="in out"),
        **norm("norm.attn", f"{LAYER}.ln_1", bias=True),
        **linear("attn.q", f"{LAYER}.attn.q_proj", "hidden -> kv dim"),
        **linear("attn.k", f"{LAYER}.attn.k_proj", "hidden -> kv dim"),
        **linear("attn.v", f"{LAYER}.attn.v_proj", "hidden -> kv dim"),
        **linear("attn.o", f"{LAYER}.attn.out_proj", "kv dim -> hidden"),
        **linear("mlp.up", f"{LAYER}.mlp.fc_in", "hidden -> ffn", bias=True),
        **linear("mlp.down", f"{LAYER}.mlp.fc_out", "ffn -> hidden", bias=True),
        **norm("norm.final", "transformer.ln_f", bias=True, writes="head"),
        "head.weight": TIED_HEAD,
        "head.bias": Part("lm_head.bias", "-> vocab"),
    },
    sizes=gpt2.anatomy.sizes,
    slot=f"{LAYER}.attn",
    defaults={
        "n_inner": lambda config: 4 * config["n_embd"],
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 1e-5,
        "n_positions": 2048,  # of the tables of cos and sin
        # The class takes how many coordinates turn, not which share of them.
        "rotary_dim": 64,
        "_rotary_share": lambda config: {
            "_share": config["rotary_dim"] * config["n_head"] / config["n_embd"]
        },
    },
    fixed={"group": 1},
    ignored={r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)": "buffer: the causal mask"},
    rewrite=gpt2.anatomy.rewrite,
    eps="layer_norm_epsilon",
    activation="activation_function",
    rotary_pairs=True,
    rotary_tables="once, sin first",
)
