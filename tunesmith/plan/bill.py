"""What a run on described machines comes to: device-hours, work, energy, carbon, money.

The one idea: every figure is time times something that was stated: the devices' limits of power, how much the building
adds (PUE), the carbon of a kilowatt-hour, a price. What was not stated is left out. Energy and carbon as Touvron et
al. (2023, arXiv 2302.13971, section 6) account for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.plan.cluster import KG_CO2_PER_KWH, Cluster
from tunesmith.plan.data_need import PETAFLOPS_DAY


@dataclass(frozen=True)
class Bill:
    """Of a whole run.

    Attributes:
        seconds: from the first step to the last.
        device_hours: over all devices.
        petaflops_days: of needed work.
        kilowatt_hours: None where a device's power is not known; kilograms of CO2 with it.
        price: in the currency of `price_per_hour`; None where there is none.
    """

    seconds: float
    device_hours: float
    petaflops_days: float
    kilowatt_hours: float | None
    co2_kilograms: float | None
    price: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bill(cluster: Cluster, steps: int, step_seconds: float, mfu: float) -> Bill:
    """Of so many steps on all devices of a cluster.

    Args:
        mfu: needed work over the peak, while the steps run.
    """
    seconds = steps * step_seconds
    hours = seconds / 3600
    watts = [None if node.watts is None else node.watts * node.devices * node.count for node in cluster.nodes]
    known = [one for one in watts if one is not None]
    energy = sum(known) / 1000 * hours * cluster.pue if len(known) == len(watts) else None
    return Bill(
        seconds=seconds,
        device_hours=hours * cluster.devices,
        petaflops_days=mfu * cluster.peak_flops * seconds / PETAFLOPS_DAY,
        kilowatt_hours=energy,
        co2_kilograms=None if energy is None else energy * cluster.kg_co2_per_kwh,
        price=None if cluster.price_per_hour is None else hours * cluster.devices * cluster.price_per_hour,
    )


def local_bill(seconds: float, flops: float, processes: int, watts: float | None, price: float | None) -> Bill:
    """Of a run on machines that are there.

    Args:
        seconds: of the run, in `processes` processes at once.
        watts: of all of them together, as measured at the plug or as the maker says; None where nobody knows.
        price: of an hour of all of them; None for none.
    """
    hours = seconds / 3600
    energy = None if watts is None else watts / 1000 * hours
    return Bill(
        seconds=seconds,
        device_hours=hours * processes,
        petaflops_days=flops / PETAFLOPS_DAY,
        kilowatt_hours=energy,
        co2_kilograms=None if energy is None else energy * KG_CO2_PER_KWH,
        price=None if price is None else hours * price,
    )


def show_local_bill(found: dict[str, Any]) -> str:
    """One line for people, of `Bill.as_dict()`."""
    if found["kilowatt_hours"] is None:
        told = "energy: unknown; --watts says what this machine takes"
    else:
        told = f"energy: {found['kilowatt_hours']:,.3g} kWh, {found['co2_kilograms']:,.3g} kg of CO2"
        told += f" at {KG_CO2_PER_KWH} kg a kWh"
    return told if found["price"] is None else f"{told}; a price of {found['price']:,.2f}"


def show_bill(found: dict[str, Any]) -> str:
    """One line for people, of `Bill.as_dict()`."""
    from tunesmith.core.amounts import in_time

    parts = [in_time(found["seconds"]), f"{found['device_hours']:,.4g} device-hours"]
    parts.append(f"{found['petaflops_days']:.3g} petaflop/s-days")
    if found["kilowatt_hours"] is not None:
        parts.append(f"{found['kilowatt_hours']:,.4g} kWh at most, {found['co2_kilograms']:,.4g} kg of CO2")
    if found["price"] is not None:
        parts.append(f"a price of {found['price']:,.2f}")
    return "the run, with the first layout: " + ", ".join(parts)
