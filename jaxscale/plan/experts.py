"""What the experts of one layer hold and send on one device, by arithmetic: jaxscale.parallel.expert."""

import math
from typing import NamedTuple

from jaxscale.config import MeshConfig, MoEConfig
from jaxscale.parallel import expert


class Experts(NamedTuple):
    """The experts of one layer on one device."""

    way: str  # "" without ep, "all_gather", "all_to_all"
    tokens: int  # before any travels
    top_k: int
    ep: int
    rows: int  # pairs of token and expert that fit into its buffers
    width: int  # of an expert's hidden layer
    shared: int  # of the shared experts' hidden layer

    def travelled(self, D: int, item: int) -> float:
        """Bytes of what dispatch keeps beside each pair's own arrays: two copies of the pairs' rows, the sum of all
        devices' tokens in float32, the tokens."""
        return 2 * self.rows * D * item + self.tokens * D * (4 * self.ep + item) if self.ep > 1 else 0.0

    def transfers(self, row: int, remat: str) -> list[tuple[str, int, float]]:
        """(kind, count, payload) of a layer, forward and backward, for rows of `row` bytes. A layer that is computed
        again dispatches again; the way back is not needed again: weights are in before it."""
        again = remat != "none"
        pairs = self.ep * self.tokens * self.top_k * 4  # expert numbers, weights
        if self.way == "all_gather":
            size = self.ep * self.tokens * row
            gathers = ("all-gather", 4 + 3 * again, (2 + again) * size + (2 + 2 * again) * pairs)
            return [gathers, ("reduce-scatter", 3, 2 * size + pairs)]
        if self.way == "all_to_all":
            size = self.rows * row
            return [("all-to-all", 7 + 3 * again, (4 + again) * size + (3 + 2 * again) * self.rows * 4)]
        return []


def place_experts(moe: MoEConfig, mesh: MeshConfig, tokens: int) -> Experts:
    """As jaxscale.parallel.expert deals with `tokens` of a device."""
    K, ep = moe.top_k, mesh.ep
    here = min(K, moe.num_experts // ep)
    width = moe.mlp_dim // mesh.tp if moe.mlp_dim % mesh.tp == 0 else moe.mlp_dim
    shared = moe.shared_dim // mesh.tp if moe.shared_dim % mesh.tp == 0 else moe.shared_dim
    way = "" if ep == 1 else expert.choose(ep, K) if moe.dispatch == "auto" else moe.dispatch
    most, even = ep * tokens * here, expert._SLACK * tokens * K
    rows = min(most, math.ceil(even / ep) * ep if way == "all_to_all" else math.ceil(even))
    return Experts(way, tokens, K, ep, rows, width, shared)
