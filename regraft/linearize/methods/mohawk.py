"""MOHAWK (Bick et al., arXiv 2408.10189): match mixing matrices, layer outputs, the distribution.

Shares of its 3 billion tokens for Phi-Mamba: 80 M, 160 M, the rest; here at least a twentieth for
each of the first two, so that small budgets have steps for them. The first two stages train mixers
only. The mixer is Mamba-2 in the attention's layout; the paper's has no norm and no activation
behind its convolution. Its repository has no licence file; none of it is used here.
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

method = Method(
    RemixOptions(mixer="mamba2", keep="none", window=0, options={"layout": "attention"}),
    (
        StageShare("matrix", 0.05, {"lr_mixer": 5e-4}),
        StageShare("align", 0.1, {"lr_mixer": 5e-4}),
        StageShare("distil", 0.85, {"lr_mixer": 5e-4}),
    ),
)
