"""XATL (Choi, arXiv 2404.02684): copy everything but the token mixer, and freeze it for a while.

The output projection is copied, too. What is copied stays frozen until the loss hardly falls any
more; next token, no teacher. The target is a RetNet; other mixers by --mixer (a block of its own,
such as mamba, copies nothing of the attention), the paper's hybrid by --keep 1,N with N half the
layers less one. Steps of the threshold are scaled to small budgets: a window of 100 steps where the
paper has 5,000. No licence is stated for the released code; none of it is used here.
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

method = Method(
    RemixOptions(mixer="retnet", keep="none", window=0, inherit="o"),
    (StageShare("next", 1.0, {"learn": "lit", "lr_new": 3e-4, "lr_mixer": 3e-4, "lr_body": 3e-4}),),
)
