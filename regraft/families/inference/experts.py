"""Experts in one tensor: maps and biases with a dimension for experts before the others."""

from __future__ import annotations

import re

from .draft import Draft
from .roles import find_named_role
from .shapes import Law, TensorName, power

# Names of maps that write the stream, where their role does not say so.
WRITERS = r"output|down|w2|fc2|o_proj"


def is_stacked(draft: Draft, parsed: TensorName, laws: list[Law | None]) -> bool:
    """Whether a tensor holds a map or a bias of every expert.

    Args:
        draft: what is known.
        parsed: name of the tensor.
        laws: of its dimensions.
    """
    if draft.laws.expert is None or laws[:1] != [power(draft.laws.expert)]:
        return False
    return len(laws) == 3 or (len(laws) == 2 and parsed.suffix.endswith("bias"))


def is_stored_output_first(draft: Draft, parsed: TensorName, laws: list[Law | None]) -> bool:
    """Whether an expert's matrix is (outputs, inputs); arguments as of `is_stacked`."""
    role = find_named_role(parsed.template) or parsed.template
    writes = re.search(WRITERS, role.rpartition(".")[2] if role.startswith("mlp.") else role)
    hidden = power(str(draft.keys["hidden"]))
    return laws[1 if writes else 2] == hidden
