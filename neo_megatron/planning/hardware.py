"""Peak rates of GPUs as their makers state them, and the share of them that is assumed to be reached."""

import re
from dataclasses import dataclass, replace

from neo_megatron.errors import ConfigError
from neo_megatron.planning.layout import Precision


@dataclass(frozen=True)
class Gpu:
    """Peak rates per GPU: operations per second (dense), bytes, bytes per second in one direction."""

    name: str
    bf16: float
    fp8: float
    fp32: float
    memory: float
    memory_rate: float
    link_rate: float
    """Between GPUs of one machine."""
    network_rate: float
    """To other machines."""
    capability: tuple[int, int]
    """Compute capability, such as (9, 0)."""
    gpus_per_machine: int = 8

    def describe(self, precision: Precision) -> str:
        return (
            f"{self.peak(precision) / 1e12:,.0f} T operations/s in {precision}, "
            f"memory {self.memory_rate / 1e12:.2f} TB/s, within a machine {self.link_rate / 1e9:,.0f} GB/s, "
            f"between machines {self.network_rate / 1e9:,.0f} GB/s"
        )

    def with_memory(self, memory: float) -> "Gpu":
        return replace(self, memory=memory)

    def peak(self, precision: Precision) -> float:
        """Operations per second.

        Raises:
            ConfigError: this GPU does not have the precision.
        """
        rate = {"bf16": self.bf16, "fp8": self.fp8, "fp32": self.fp32}[precision]
        if not rate:
            raise ConfigError(f"--gpu {self.name} has no {precision}: choose --bf16, or another GPU")
        return rate


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 0, 19.5e12, 80e9, 2.04e12, 300e9, 25e9, (8, 0)),
        Gpu("h100", 989e12, 1979e12, 67e12, 80e9, 3.35e12, 450e9, 50e9, (9, 0)),
        Gpu("h200", 989e12, 1979e12, 67e12, 141e9, 4.8e12, 450e9, 50e9, (9, 0)),
        Gpu("b200", 2250e12, 4500e12, 75e12, 180e9, 8e12, 900e9, 50e9, (10, 0)),
    )
}


def gpu_named(device: str) -> Gpu | None:
    """The stated rates of a device, looked up by its driver's name such as ``NVIDIA H100 80GB HBM3``.

    ``None`` if none are stated, as for Hopper cards with PCIe, which run slower.
    """
    words = re.findall(r"[a-z0-9]+", device.lower())
    gpu = next((gpu for name, gpu in GPUS.items() if name in words), None)
    return None if gpu is not None and gpu.name.startswith("h") and {"pcie", "nvl"} & set(words) else gpu


@dataclass(frozen=True)
class Efficiency:
    """Assumed shares of the peak rates; none of them has been measured on a GPU."""

    products: float = 0.65
    attention: float = 0.4
    memory: float = 0.7
    links: float = 0.7
    reserved_bytes: float = 5e9
    """Kept free for CUDA, NCCL and fragmentation."""

    def describe(self) -> str:
        return (
            f"assumed: {self.products:.0%} of the peak in matrix products, {self.attention:.0%} in attention, "
            f"{self.memory:.0%} of the memory's rate, {self.links:.0%} of the links'; "
            f"{self.reserved_bytes / 1e9:.0f} GB kept free for CUDA, NCCL and fragmentation"
        )
