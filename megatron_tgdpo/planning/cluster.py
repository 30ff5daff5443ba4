"""The machines of a plan."""

import math
from dataclasses import dataclass

from megatron_tgdpo.planning.peak import H100_TFLOPS


@dataclass(frozen=True)
class Cluster:
    """The machines. The defaults are an H100 SXM node's data sheet values and assumed efficiencies.

    Source: NVIDIA's data sheets of the H100 SXM (``peak.py``, 80 GB, NVLink 900 GB/s and PCIe 128 GB/s
    for both directions together) and of the DGX H100 (one 400 Gb/s network port per GPU).

    Attributes:
        nodes: Machines.
        gpus_per_node: GPUs in each.
        gpu_memory_gib: Memory of a GPU.
        reserve_gib: Of it, what CUDA, NCCL and the allocator's gaps take (assumed).
        peak_tflops: Peak of dense bf16, TFLOP/s.
        efficiency: Part of the peak that the models' products reach (assumed), together with what is memory-bound
            between them unless ``memory_gbytes`` is given.
        nvlink_gbytes: GB/s that a GPU sends inside the node.
        network_gbytes: GB/s that a GPU sends to other nodes.
        link_efficiency: Part of either that collectives reach (assumed).
        host_gbytes: GB/s that a GPU gets from its node's memory.
        memory_gbytes: GB/s that a GPU's memory reads and writes, to count what is memory-bound on its own; 0: that is
            part of ``efficiency``.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory_gib: float = 80.0
    reserve_gib: float = 6.0
    peak_tflops: float = H100_TFLOPS
    efficiency: float = 0.4
    nvlink_gbytes: float = 450.0
    network_gbytes: float = 50.0
    link_efficiency: float = 0.7
    host_gbytes: float = 64.0
    memory_gbytes: float = 0.0

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def flops(self) -> float:
        """FLOP/s that a GPU reaches."""
        return self.peak_tflops * 1e12 * self.efficiency

    def bandwidth(self, span: int) -> float:
        """Bytes/s that a GPU sends to others among ``span`` consecutive ranks."""
        inside = span <= self.gpus_per_node and self.gpus_per_node % span == 0
        return (self.nvlink_gbytes if inside else self.network_gbytes) * 1e9 * self.link_efficiency

    @property
    def host_bandwidth(self) -> float:
        """Bytes/s from the node's memory to a GPU."""
        return self.host_gbytes * 1e9 * self.link_efficiency

    @property
    def memory_bandwidth(self) -> float:
        """Bytes/s of a GPU's memory; infinite where memory-bound operations are part of the products' efficiency."""
        return self.memory_gbytes * 1e9 or math.inf
