"""Devices and links as data sheets have them, and the sections of cluster.yaml that say others.

The one idea: every number of the table can be looked up; what cannot (how much of a peak a program reaches) is an
assumption of the cluster (`cluster`), not of the device. Bandwidths are of one direction.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tunesmith.core.errors import did_you_mean
from tunesmith.core.section import Section


class LinkSection(Section):
    """A link of one device, as time = latency + bytes / bandwidth (Hockney 1994).

    Attributes:
        gb_per_second: 10^9 bytes a second in one direction.
        microseconds: from the start of a message to its first byte.
    """

    gb_per_second: float = Field(gt=0)
    microseconds: float = Field(ge=0)


class DeviceSection(Section):
    """What computes: a GPU, or a socket of CPU cores.

    Attributes:
        name: as it is called in the answer.
        tflops: peak of dense bf16 products, 10^12 a second.
        memory_gb: 10^9 bytes.
        memory_gb_per_second: how fast that is read.
        watts: what it takes at its limit; None where nothing is said of it, and then nothing of energy.
        within: its link to the devices of its node, unless the node says another.
        between: its link to other nodes, unless the node says another.
    """

    name: str = Field(min_length=1)
    tflops: float = Field(gt=0)
    memory_gb: float = Field(gt=0)
    memory_gb_per_second: float = Field(gt=0)
    watts: float | None = Field(default=None, gt=0)
    within: LinkSection
    between: LinkSection


# latencies of a step of a ring, from the tuning table of NCCL (src/graph/tuning.cc, hwLat, Ring, Simple)
NVLINK_US, PCIE_US, NETWORK_US = 3.4, 5.7, 14.0


def _device(
    name: str, tflops: float, memory: float, bandwidth: float, watts: float, within: float, between: float
) -> DeviceSection:
    return DeviceSection(
        name=name,
        tflops=tflops,
        memory_gb=memory,
        memory_gb_per_second=bandwidth,
        watts=watts,
        within=LinkSection(gb_per_second=within, microseconds=NVLINK_US if within >= 100 else PCIE_US),
        between=LinkSection(gb_per_second=between, microseconds=NETWORK_US),
    )


PRESETS: dict[str, DeviceSection] = {
    device.name: device
    for device in (
        #       name        TFLOP/s  GB  GB/s of memory, watts at the limit, node, network
        # watts of a100, h100, h200, b200: data sheets compared at hmc-tech.com/gpus; of rtx-4090: NVIDIA's FAQ of its
        # 40 series, as t3.com reports it; of rtx-3090: techbloat.com; all others from memory, unverified
        # NVIDIA A100 data sheet, SXM: 312 dense; NVLink 600 GB/s both ways; DGX A100: 200 Gb/s a GPU
        _device("a100-40gb", 312.0, 40.0, 1555.0, 400.0, 300.0, 25.0),
        _device("a100", 312.0, 80.0, 2039.0, 400.0, 300.0, 25.0),
        # NVIDIA H100 data sheet, SXM: 1,979 with sparsity; NVLink 900 GB/s both ways; DGX H100: 400 Gb/s a GPU
        _device("h100", 989.5, 80.0, 3350.0, 700.0, 450.0, 50.0),
        # NVIDIA H200 data sheet, SXM: as H100, with 141 GB at 4.8 TB/s; DGX H200: 400 Gb/s a GPU
        _device("h200", 989.5, 141.0, 4800.0, 700.0, 450.0, 50.0),
        # NVIDIA DGX B200 data sheet: 1,440 GB and 64 TB/s of 8 GPUs, 400 Gb/s a GPU; HGX B200: 36 PFLOP/s of 8 with
        # sparsity; NVLink 1,800 GB/s both ways
        _device("b200", 2250.0, 180.0, 8000.0, 1000.0, 900.0, 50.0),
        # NVIDIA GA102 white paper: 71 dense with float32 sums; PCIe 4.0 x16; network: 10 gigabit Ethernet
        _device("rtx-3090", 71.0, 24.0, 936.0, 350.0, 31.5, 1.25),
        # NVIDIA Ada white paper: 165.2 dense with float32 sums; PCIe 4.0 x16
        _device("rtx-4090", 165.2, 24.0, 1008.0, 450.0, 31.5, 1.25),
        # NVIDIA RTX Blackwell white paper: 209.5 dense with float32 sums; PCIe 5.0 x16
        _device("rtx-5090", 209.5, 32.0, 1792.0, 575.0, 63.0, 1.25),
        # NVIDIA L40S data sheet: 362 dense; PCIe 4.0 x16
        _device("l40s", 362.0, 48.0, 864.0, 350.0, 31.5, 1.25),
        # NVIDIA RTX A6000 data sheet: 309.7 with sparsity, halved; PCIe 4.0 x16
        _device("rtx-a6000", 154.8, 48.0, 768.0, 300.0, 31.5, 1.25),
        # a socket of Intel Xeon 8480+: 56 cores x 2.0 GHz x 1,024 (AMX, Intel optimization manual); eight channels of
        # DDR5-4800, 16 modules of 32 GB; one link of UPI at 16 GT/s x 24 bits; network: 10 gigabit Ethernet
        _device("cpu", 114.7, 512.0, 307.2, 350.0, 48.0, 1.25),
    )
}  # fmt: skip


def _preset(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in PRESETS:
        close = did_you_mean(value, PRESETS)
        nearest = f"; {close}" if close else ""
        raise ValueError(f"{value!r} is no device; there are {' '.join(PRESETS)}, or a section of its numbers{nearest}")
    return PRESETS[value]


Device = Annotated[DeviceSection, BeforeValidator(_preset)]
"""The name of a preset, or a section."""
