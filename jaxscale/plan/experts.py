"""What the experts of one layer hold and send on one device, by arithmetic: jaxscale.parallel.expert."""

import math
from typing import NamedTuple

from jaxscale.config import MeshConfig, MoEConfig
from jaxscale.parallel import expert, expert_remote
from jaxscale.parallel.permute import UNROLLED


class Experts(NamedTuple):
    """The experts of one layer on one device."""

    way: str  # "" without ep, else a dispatch; inside of hosts for two_level
    tokens: int  # before any travels
    top_k: int
    ep: int
    experts: int  # of the devices that exchange: all, or those of a host
    rows: int  # pairs of token and expert that fit into its buffers
    width: int  # of an expert's hidden layer
    shared: int  # of the shared experts' hidden layer
    hosts: int = 1  # that tokens travel to first; arriving: rows that a device then has of others, or room for them
    arriving: int = 0
    overflows: tuple[int, ...] = ()  # tokens at each level whose buffers some routing overflows

    @property
    def collected(self) -> int:
        """Rows that are gathered, one for each place of a token, before they are added up."""
        places, n = min(self.top_k, UNROLLED), self.arriving or self.tokens
        if self.way == "all_to_all":  # first each arrived pair's only place, then those of a token in the buffer
            return max(self.rows, n * places)
        if self.way == "remote_copy":  # at home alone
            return n * places
        return n * (self.ep // self.hosts) * places

    def kept_for_rounds(self, row: int) -> float:
        """Bytes kept for further rounds: the tokens, of `row` bytes, of each such level."""
        return float(sum(self.overflows) * row)

    def transfers(self, row: int, remat: str) -> list[tuple[str, str, int, float]]:
        """(kind, axis, count, payload) of a layer, forward and backward, for rows of `row` bytes. A layer that is
        computed again dispatches again; the way back is not needed again: weights are in before it. The axis is "ep",
        or "ep hosts" and "ep inside", its two levels."""
        again = remat != "none"
        choices = self.top_k if self.hosts > 1 else 1  # that travel with a row of a buffer
        exchange = lambda axis, rows, choices: (
            "all-to-all", axis, 7 + 3 * again, (4 + again) * rows * row + (3 + 2 * again) * rows * choices * 4,
        )  # fmt: skip
        found, axis, tokens, size = [], "ep", self.tokens, self.ep
        if self.hosts > 1:
            axis, tokens, size = "ep inside", self.arriving, self.ep // self.hosts
            found.append(exchange("ep hosts", self.arriving, choices))
        if size > 1 and self.way == "all_gather":
            pairs = size * tokens * self.top_k * 4  # weights; expert numbers and where each device sorted its own to
            orders = 2 * pairs + size * (self.experts + 1) * 4
            gathered = (2 + again) * size * tokens * row + (1 + again) * (pairs + orders)
            found.append(("all-gather", axis, 4 + 3 * again, gathered))
            found.append(("reduce-scatter", axis, 3, 2 * size * tokens * row + pairs))
        if size > 1 and self.way == "all_to_all":
            found.append(exchange(axis, self.rows, 1))
        if size > 1 and self.way == "remote_copy":  # what routing sends, and a weight for each row
            pairs = self.tokens * self.top_k
            weight = expert_remote._WEIGHT / expert_remote.block_of(pairs, self.experts)
            sent = pairs + expert_remote.filling(pairs, self.experts)
            sent *= (4 + again) * row + (2 + again) * weight
            found.append(("ragged-all-to-all", axis, 6 + 2 * again, sent))
            found.append(("all-gather", axis, 1 + again, (1 + again) * size * self.experts * 4))
        return found


def place_experts(
    moe: MoEConfig,
    mesh: MeshConfig,
    tokens: int,
    hosts: int = 1,
    far: float = 1.0,
    remote_row: int | None = None,
) -> Experts:
    """As jaxscale.parallel.expert deals with `tokens` of a device.

    Args:
      hosts: that ep spans. far: how much longer a byte takes between them than inside one.
      remote_row: bytes of a token's row on devices that copy into each other's memory; None: they do not.
    """
    K, ep = moe.top_k, mesh.ep
    here = min(K, moe.num_experts // ep)
    width = moe.mlp_dim // mesh.tp if moe.mlp_dim % mesh.tp == 0 else moe.mlp_dim
    shared = moe.shared_dim // mesh.tp if moe.shared_dim % mesh.tp == 0 else moe.shared_dim
    part = -(-tokens // min(moe.dispatch_chunks, tokens))
    remote = None if remote_row is None else expert.remote_cost(part, moe.num_experts, remote_row)
    way = "" if ep == 1 else expert.choose(ep, K, hosts, far, remote) if moe.dispatch == "auto" else moe.dispatch
    if way != "two_level":
        hosts, arriving, size = 1, 0, ep
    else:
        arriving, size = hosts * math.ceil(tokens * expert.share_of_a_host(hosts, K)), ep // hosts
        way = expert.choose_inside(size, arriving / tokens, K, remote)
    n = arriving or tokens
    most, even = size * n * here, tokens * K
    if way == "all_to_all":
        rows = math.ceil(expert._SLACK * even / size) * size
    elif way == "remote_copy":
        rows = expert.room_for(even + expert_remote.filling(even, moe.num_experts // hosts), moe.num_experts // ep)
    else:
        rows = expert.room_for(even, moe.num_experts // ep)
    rows = min(most, rows)
    visitors = size * n if way == "all_gather" else n
    overflows = ((tokens,) if hosts > 1 and arriving < hosts * tokens else ()) + ((visitors,) if rows < most else ())
    overflows = overflows if ep > 1 else ()
    return Experts(way, tokens, K, ep, moe.num_experts // hosts, rows, width, shared, hosts, arriving, overflows)
