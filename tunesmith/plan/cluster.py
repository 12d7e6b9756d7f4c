"""A cluster as cluster.yaml says it, and where the processes of a layout come to lie in it.

The one idea: processes are numbered tensor first, then data, then pipeline, and laid over the devices in the order of
the nodes, so that what speaks most lies nearest: a tensor group within a node, a stage on neighbouring nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from pydantic import Field

from tunesmith.core.section import Section
from tunesmith.plan.devices import Device, LinkSection
from tunesmith.plan.links import Link

# of a device's memory, for tensors: the rest is the driver's, the libraries' and what the allocator cannot use
ROOM = 0.9
KG_CO2_PER_KWH = 0.385  # the average of the United States (Touvron et al. 2023, arXiv 2302.13971, section 6)


class NodeSection(Section):
    """Nodes that are alike.

    Attributes:
        device: the name of a preset (`plan.devices`), or its numbers.
        devices: in each node.
        count: how many such nodes there are.
        within: the link of a device to others of its node; None takes the device's.
        between: the link of a device to other nodes; None takes the device's.
    """

    device: Device
    devices: int = Field(default=8, ge=1, le=1024)
    count: int = Field(default=1, ge=1, le=65_536)
    within: LinkSection | None = None
    between: LinkSection | None = None


class ClusterSection(Section):
    """The file cluster.yaml.

    Attributes:
        nodes: groups of nodes that are alike; processes are laid over them in this order.
        compute_efficiency: of the peak of products that a stage reaches while it computes, everything between the
            products included.
        link_efficiency: of a link's bandwidth that a collective reaches.
        pue: energy of the building over that of its computers.
        kg_co2_per_kwh: of the electricity; the average of the United States (Touvron et al. 2023, arXiv 2302.13971).
        price_per_hour: of one device; None leaves money out.
    """

    nodes: list[NodeSection] = Field(min_length=1)
    compute_efficiency: float = Field(default=0.6, gt=0, le=1)
    link_efficiency: float = Field(default=0.8, gt=0, le=1)
    pue: float = Field(default=1.1, ge=1)
    kg_co2_per_kwh: float = Field(default=KG_CO2_PER_KWH, ge=0)
    price_per_hour: float | None = Field(default=None, ge=0)


@dataclass(frozen=True)
class Node:
    """Nodes that are alike, in bytes and seconds.

    Attributes:
        name: of the device.
        devices, count: in each node, and nodes.
        peak_flops: a second, of one device, by its data sheet.
        flops: a second that are reached.
        memory_bytes: of one device.
        memory_bandwidth: bytes a second.
        watts: of one device; None where it is not known.
        within, between: links of one device, at what collectives reach.
    """

    name: str
    devices: int
    count: int
    peak_flops: float
    flops: float
    memory_bytes: int
    memory_bandwidth: float
    within: Link
    between: Link
    watts: float | None = None

    @property
    def room_bytes(self) -> int:
        """What tensors of one device may take."""
        return int(ROOM * self.memory_bytes)


class Cluster:
    """Nodes in order.

    Attributes:
        nodes: groups of them.
        compute_efficiency, link_efficiency, pue, kg_co2_per_kwh, price_per_hour: as the section has them.
    """

    def __init__(self, section: ClusterSection) -> None:
        self.compute_efficiency, self.link_efficiency = section.compute_efficiency, section.link_efficiency
        self.pue, self.kg_co2_per_kwh, self.price_per_hour = section.pue, section.kg_co2_per_kwh, section.price_per_hour
        self.nodes = [_node(node, section) for node in section.nodes]

    @cached_property
    def places(self) -> list[tuple[Node, int]]:
        """Of each device, its kind of node and the number of its node."""
        nodes = [node for node in self.nodes for _ in range(node.count)]
        return [(node, number) for number, node in enumerate(nodes) for _ in range(node.devices)]

    @property
    def devices(self) -> int:
        return len(self.places)

    @property
    def peak_flops(self) -> float:
        """A second, of all devices."""
        return sum(node.count * node.devices * node.peak_flops for node in self.nodes)

    def tensor_sizes(self) -> list[int]:
        """Into how many equal groups the devices of every node can be put, by the size of a group."""
        least = min(node.devices for node in self.nodes)
        return [size for size in range(1, least + 1) if all(node.devices % size == 0 for node in self.nodes)]

    def line(self) -> str:
        """In words: "8 x 8 h100, 2 x 8 a100"."""
        return ", ".join(f"{node.count} x {node.devices} {node.name}" for node in self.nodes)


class Placement:
    """The processes of a layout on the devices of a cluster.

    Attributes:
        replicas: kinds of replica and how many there are of each; a kind is the node of each of its stages.
        members: of each replica, the number of its kind.
        data_links: of each stage, the slowest link of the ring through its replicas.
        stage_links: between each stage and the next, the slowest of all replicas.
        stages: of each stage, the kinds of node that hold a replica of it.
    """

    def __init__(self, cluster: Cluster, tensor: int, data: int, pipeline: int) -> None:
        places = cluster.places
        firsts = [[places[(stage * data + replica) * tensor] for replica in range(data)] for stage in range(pipeline)]
        kinds = Counter(tuple(id(firsts[stage][replica][0]) for stage in range(pipeline)) for replica in range(data))
        nodes = {id(node): node for node in cluster.nodes}
        numbers = {kind: number for number, kind in enumerate(kinds)}
        self.replicas = [(tuple(nodes[key] for key in kind), count) for kind, count in kinds.items()]
        self.members = [
            numbers[tuple(id(firsts[stage][replica][0]) for stage in range(pipeline))] for replica in range(data)
        ]
        self.data_links = [ring_link(stage) for stage in firsts]
        self.stage_links = [
            slowest([_between(one, other) for one, other in zip(lower, upper, strict=True)])
            for lower, upper in pairwise(firsts)
        ]
        self.stages = [list({id(node): node for node, _ in stage}.values()) for stage in firsts]


def ring_link(places: Sequence[tuple[Node, int]]) -> Link:
    """The slowest link of a ring through these devices.

    Rings through all devices that a group has in a node leave it in parallel, each by the network of its device, as
    NCCL's channels do: m devices of the group in a node have m times the network of one.
    """
    within = slowest([node.within for node, _ in places])
    members = Counter(number for _, number in places)
    if len(members) == 1:
        return within
    nodes = {number: node.between for node, number in places}
    rate = min(members[number] * link.bytes_per_second for number, link in nodes.items())
    latency = max(link.seconds for link in nodes.values())
    return Link(min(rate, within.bytes_per_second if max(members.values()) > 1 else rate), latency)


def slowest(links: Sequence[Link]) -> Link:
    """The lowest bandwidth and the highest latency of some links."""
    return Link(min(link.bytes_per_second for link in links), max(link.seconds for link in links))


def _between(one: tuple[Node, int], other: tuple[Node, int]) -> Link:
    (node, number), (next_node, next_number) = one, other
    return node.within if number == next_number else slowest([node.between, next_node.between])


def _node(node: NodeSection, section: ClusterSection) -> Node:
    device = node.device

    def link(given: LinkSection | None, usual: LinkSection) -> Link:
        taken = given or usual
        return Link(taken.gb_per_second * 1e9 * section.link_efficiency, taken.microseconds * 1e-6)

    return Node(
        name=device.name,
        devices=node.devices,
        count=node.count,
        peak_flops=device.tflops * 1e12,
        flops=device.tflops * 1e12 * section.compute_efficiency,
        memory_bytes=round(device.memory_gb * 1e9),
        memory_bandwidth=device.memory_gb_per_second * 1e9,
        within=link(node.within, device.within),
        between=link(node.between, device.between),
        watts=device.watts,
    )
