"""Models the bytes that a load moves over the disk, the bus and the network of a cluster.

    python benchmarks/cluster_model.py --bytes 16e9 --nodes 1 8 64 --ranks-per-node 8

For a checkpoint of B bytes on n nodes of p ranks each (world N = n p):

- Replicated, scope="node": the ranks of each node together read B. Each gets the other (p - 1)/p
  from its node's ranks over the node's bus.
- Replicated, scope="group": all ranks together read B, and each broadcasts its B/N to the N - 1
  others. The rings and trees of gloo and NCCL send each piece into each other node at least once,
  and to each rank once.
- Sharded (FSDP2 or tensor parallel over all ranks): each rank reads its B/N; nothing is sent.
- Sharded within a node, replicated over nodes (HSDP): each node reads B.
- Stock: each rank reads B through its node's page cache: N B in total, and B for each node from the
disk.

The engine counts "out of files"; tests/python/bench/test_bench_ranks.py compares it with 2 and 4
processes. The disk's share assumes that a node reads no byte twice from the disk, and that a shared
file system serves all nodes. Times are lower bounds: those of the busiest of disk, bus and network,
at the given rates and without latencies.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

WAYS = ("replicated, node", "replicated, group", "sharded", "sharded in a node", "stock")


@dataclasses.dataclass(frozen=True)
class Moved:
    """Bytes that a load moves.

    Attributes:
        out_of_files: read by all ranks together, as the engine counts.
        disk: from the shared storage to all nodes together.
        received: by all ranks together from other ranks.
        node_bus: into the ranks of one node, from the page cache or from other ranks.
        node_network: into one node from other nodes' ranks, without the storage.
        held: by one rank after the load.
    """

    out_of_files: float
    disk: float
    received: float
    node_bus: float
    node_network: float
    held: float


def moved(way: str, size: float, nodes: int, per_node: int) -> Moved:
    """The model of one of ``WAYS`` for ``size`` bytes."""
    world = nodes * per_node
    if way == "replicated, node":
        received = nodes * (per_node - 1) * size
        return Moved(nodes * size, nodes * size, received, per_node * size, 0, size)
    if way == "replicated, group":
        foreign = size * (nodes - 1) / nodes
        return Moved(size, size, (world - 1) * size, per_node * size, foreign, size)
    if way == "sharded":
        return Moved(size, size, 0, size / nodes, 0, size / world)
    if way == "sharded in a node":
        return Moved(nodes * size, nodes * size, 0, size, 0, size / per_node)
    return Moved(world * size, nodes * size, 0, per_node * size, 0, size)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of the shared storage, a node's bus and a node's network, in bytes/s."""

    storage: float
    bus: float
    network: float


def least_seconds(found: Moved, nodes: int, rates: Rates) -> float:
    """The storage also comes over the network."""
    network = (found.disk / nodes + found.node_network) / rates.network
    return max(found.disk / rates.storage, found.node_bus / rates.bus, network)


def table(size: float, nodes: Sequence[int], per_node: int, rates: Rates) -> str:
    """A line for each way and number of nodes; bytes as multiples of the checkpoint's."""
    lines = [
        f"{size / 1e9:.0f} GB, {per_node} ranks a node; multiples of the checkpoint's bytes",
        f"storage {rates.storage / 1e9:.0f}, a node's bus {rates.bus / 1e9:.0f}, its network "
        f"{rates.network / 1e9:.0f} GB/s",
        "",
        f"{'':18} {'nodes':>5} {'of files':>9} {'disk':>7} {'received':>9} {'bus/node':>9} "
        f"{'net/node':>9} {'held/rank':>9} {'least':>9}",
    ]
    for count in nodes:
        for way in WAYS:
            one = moved(way, size, count, per_node)
            columns = [one.out_of_files, one.disk, one.received, one.node_bus, one.node_network]
            widths = (9, 7, 9, 9, 9)
            cells = " ".join(f"{c / size:{w}.2f}" for c, w in zip(columns, widths, strict=True))
            seconds = least_seconds(one, count, rates)
            lines.append(f"{way:18} {count:5} {cells} {one.held / size:9.4f} {seconds:7.2f} s")
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bytes", type=float, default=16e9)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--storage", type=float, default=20e9, help="bytes a second, of all")
    parser.add_argument("--bus", type=float, default=200e9, help="bytes a second, of a node")
    parser.add_argument("--network", type=float, default=50e9, help="bytes a second, of a node")
    given = parser.parse_args()
    rates = Rates(given.storage, given.bus, given.network)
    print(table(given.bytes, given.nodes, given.ranks_per_node, rates))
