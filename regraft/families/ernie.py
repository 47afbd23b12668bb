"""ERNIE (arXiv 1904.09223): BERT, and an embedding of tasks where the config wants one."""

from dataclasses import replace

from ..core.anatomy import linear
from . import bert
from .bert import DEFAULTS, base_prefix, head_defaults

HEADS = {name.replace("Bert", "Ernie"): heads for name, heads in bert.HEADS.items()}

anatomy = replace(
    bert.anatomy,
    family="ernie",
    parts={
        **bert.anatomy.parts,
        **linear(
            "task", "{p}embeddings.task_type_embeddings", "task -> hidden", stored="in out",
            writes="branch", when="use_task_id",
        ),
    },
    sizes=(*bert.SIZES, ("task_type_vocab_size", "task")),
    defaults={
        **DEFAULTS,
        **head_defaults(HEADS),
        "use_task_id": False,
        "task_type_vocab_size": 3,
    },
    prefix=base_prefix(HEADS, "ernie."),
)  # fmt: skip
