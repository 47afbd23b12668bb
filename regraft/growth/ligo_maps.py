"""Learned maps of one axis: how its coordinates are written, and how they are read (LiGO)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.axes import Expansion, build_expansion
from ..core.shapes import Float
from .ligo_options import Ligo


class AxisMap(nn.Module):
    """The maps of one axis: B (new, old) says how its coordinates are written, A (new, old) how
    they are read.

    Args:
        axis: the expansion that the maps begin as.
        method: LiGO's options.
        generator: of random rows.
        linear: nothing but maps and norms stand between writers and readers, so that A may undo any
            B.
        learns: whether the maps may change; rotary positions fix those of queries and keys.
    """

    # Rows of B that do not learn: (rows, old), the first ones.
    fixed_rows: Tensor
    # Coordinates that nothing old is written to at first, so that their gains begin at one.
    silent: Tensor
    # The start of A: (new, old).
    shares: Tensor

    def __init__(
        self,
        axis: Expansion,
        method: Ligo,
        generator: torch.Generator,
        linear: bool,
        learns: bool = True,
    ):
        super().__init__()
        self.reads, self.linear = method.reads, linear
        written, shares = axis.write_matrix.float(), axis.read_matrix.T.float()

        # Rows of new coordinates. For the random ones see section 1.4 of docs/concepts/ligo.md.
        new, averaged = axis.new_coordinates, method.start == "average" and learns
        if averaged:
            rows = torch.rand(len(new), axis.old, generator=generator)
            written[new] = rows / rows.sum(1, keepdim=True)
        elif method.start == "random" and learns:
            written[new] = torch.randn(len(new), axis.old, generator=generator) / axis.old**0.5

        # B = [fixed rows; rows]. Only `rows` and `readers` are in the state that is saved.
        fixed = _count_fixed_rows(axis, method, learns)
        self.register_buffer("silent", new[:0] if averaged else new, persistent=False)
        self.register_buffer("fixed_rows", written[:fixed].clone(), persistent=False)
        self.rows = nn.Parameter(written[fixed:].clone())
        self.register_buffer("shares", shares.clone(), persistent=False)
        learns_to_read = method.reads != "tied" and not linear and learns
        self.readers = nn.Parameter(torch.zeros_like(shares)) if learns_to_read else None

        # How many rows of B are those of the identity, and whether A has them too.
        self.identity_rows = axis.old if fixed >= axis.old and axis.starts_with_old else 0
        self.reads_old_in_full = bool((shares[: axis.old].sum(1) == 1).all())
        # Whether B is scaled to the size of an orthogonal matrix: the stream is read by norms,
        # which do not see its scale.
        self.keeps_scale = False

    def identity_count(self, read: bool) -> int:
        """How many coordinates, from the first, a map leaves as they are: [I; C] need not multiply
        by I.

        Args:
            read: ask for A, else for B.
        """
        if read:
            return self.identity_rows if self.reads == "tied" and self.reads_old_in_full else 0
        rescaled = self.linear and (self.reads == "orthogonal" or self.keeps_scale)
        return 0 if rescaled else self.identity_rows

    def forward(self) -> tuple[Float[Tensor, "new old"], Float[Tensor, "new old"]]:
        """(B, A)."""
        written = torch.cat([self.fixed_rows, self.rows])
        if self.reads == "tied":
            share = self.shares.sum(1, keepdim=True)
            return written, written * torch.where(share == 0, 1.0, share)
        if not self.linear:
            return written, self.shares if self.readers is None else self.shares + self.readers

        # A^T B = I (docs/concepts/ligo.md, section 1.5): A = B (B^T B)^-1, that is pinv(B)^T.
        gram = written.T @ written
        if self.reads == "inverse":
            scale = (gram.trace() / len(gram)).sqrt() if self.keeps_scale else 1.0
            return written / scale, torch.linalg.solve(gram, written.T).T * scale

        # With B^T B = L L^T the columns of B L^-T are orthonormal, and A is the same matrix.
        factor = torch.linalg.cholesky(gram)
        written = torch.linalg.solve_triangular(factor, written.T, upper=False).T
        return written, written


def _count_fixed_rows(axis: Expansion, method: Ligo, learns: bool) -> int:
    """How many rows of B, from the first, do not learn."""
    if not learns:
        return axis.new
    return axis.old if method.free == "new" and axis.starts_with_old else 0


def flatten_head_axes(kv: Expansion, dim: Expansion) -> Expansion:
    """The coordinates of all heads as one axis, head by head."""
    # A coordinate copies one exactly if its head and its place in the head both do.
    index = kv.index[:, None] * dim.old + dim.index  # (heads, dim)
    copies_none = (kv.index[:, None] < 0) | (dim.index < 0)
    index = torch.where(copies_none, -1, index)
    share = kv.share[:, None] * dim.share
    name = f"{kv.name} {dim.name}"
    return build_expansion(name, kv.old * dim.old, index.flatten(), share.flatten())
