"""Devices that a plan may name: memory and bandwidths, from their makers' data sheets. Peaks are `engine.metrics`'s.

Knows no price and no rumour. Sizes are decimal, as printed on the sheets (80 GB = 80·10⁹ bytes): what a driver reports is a
little more, and what a program may use a little less.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from megalith.engine.metrics import Peak, peak
from megalith.errors import ConfigError, Problem

GB = 10**9


@dataclass(frozen=True)
class Device:
    """One accelerator. Bytes, and bytes a second; `link` and `network` in one direction, None where no sheet says.

    `driver_name` is what its driver calls it, by which `engine.metrics` finds its peak. `link` connects the `per_node` devices
    of a machine, `network` the machines: that of the maker's own system, a device's share.
    """

    name: str
    driver_name: str
    memory: int
    bandwidth: float
    link: float | None
    network: float | None
    per_node: int
    source: str

    def peak(self, precision: str) -> Peak | None:
        """Dense matrix products in a precision; None where the device has no such units."""
        return peak(self.driver_name, precision)

    @property
    def is_gpu(self) -> bool:
        """Or the processor of this machine?"""
        return self.driver_name != "CPU"


def _device(
    name: str, driver: str, memory: float, bandwidth: float, *, link: float | None = None,
    network: float | None = None, per_node: int = 8, source: str = "",
) -> Device:  # fmt: skip
    """Numbers in GB and GB/s as the sheets print them; links there are the sum of both directions, networks are not."""
    return Device(
        name, driver, round(memory * GB), bandwidth * GB, link and link / 2 * GB, network and network * GB,
        per_node, source,
    )  # fmt: skip


DEVICES = (
    _device("V100-16", "V100-SXM2", 16, 900, link=300, source="NVIDIA V100 data sheet"),
    _device("V100-32", "V100-SXM2", 32, 900, link=300, source="NVIDIA V100 data sheet"),
    _device("A100-40", "A100", 40, 1555, link=600, network=25, source="NVIDIA A100 and DGX A100 data sheets"),
    _device("A100-80", "A100", 80, 2039, link=600, network=25, source="NVIDIA A100 and DGX A100 data sheets"),
    _device("L40S", "L40S", 48, 864, source="NVIDIA L40S data sheet"),
    _device("RTX4090", "RTX 4090", 24, 1008, per_node=1, source="NVIDIA Ada architecture white paper"),
    _device(
        "H100", "H100", 80, 3350, link=900, network=50, source="NVIDIA H100 SXM and DGX H100 data sheets"
    ),
    _device("H200", "H200", 141, 4800, link=900, network=50, source="NVIDIA H200 and DGX H200 data sheets"),
    _device(
        "B200", "B200", 180, 8000, link=1800, network=50, source="NVIDIA HGX B200 and DGX B200 data sheets"
    ),
    _device("MI300X", "MI300X", 192, 5300, link=896, source="AMD Instinct MI300X data sheet"),
)
ALIASES = {"A100": "A100-80", "V100": "V100-32", "H100-80": "H100", "H100-SXM": "H100", "RTX-4090": "RTX4090", "4090": "RTX4090"}  # fmt: skip


def find(name: str) -> Device:
    """The device of a name. Errors: `ConfigError` with the names that there are."""
    wanted = name.strip().upper().replace("_", "-").replace(" ", "-")
    wanted = ALIASES.get(wanted, wanted)
    known = {device.name.upper(): device for device in DEVICES}
    if wanted in known:
        return known[wanted]
    near = get_close_matches(wanted, known, n=2, cutoff=0.5)
    fix = f"one of {', '.join(device.name for device in DEVICES)}"
    if near:
        fix = f"{' or '.join(known[key].name for key in near)}? There are {fix.removeprefix('one of ')}"
    raise ConfigError([Problem("--device", f"no device is called {name!r}", fix)])
