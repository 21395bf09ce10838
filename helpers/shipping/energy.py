"""What a piece of work took in electricity, and what that stands for in CO2: measured while it runs, or estimated from recorded seconds.

Through codecarbon (Courty et al.), without a network, a file or a log line. Where a processor has an energy counter that may be
read (RAPL on Linux, Windows 11's own), it is read; elsewhere the power is modelled from the processor's rating and its load, and a
rented machine seldom shows more than a generic name. So most figures here are estimates, right to a factor of two or three.
"""

import io
import logging
import re
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata

from helpers.files import CourseError

LEAVES_OUT = (
    "power supply, cooling, screen, disk and network",
    "making the machine",
    "pre-training of the base model",
    "runs that were tried before this one",
    "every answer that is given later",
)
CORE_WATTS, MEMORY_WATTS = 4.0, 20.0  # codecarbon's own where it knows no better: a thread, and the memory of a machine with four modules
WORLD = (475.0, "world mean of 2018, IEA")  # grams of CO2e a kWh, as codecarbon has it too
COUNTERS = ("intel_rapl", "windows_emi", "intel_power_gadget")


@dataclass(frozen=True)
class Used:
    """seconds; kwh in all, and of processor, memory and GPU; grams of CO2e at `intensity` grams a kWh; and how it is known."""

    seconds: float
    kwh: float
    cpu_kwh: float
    memory_kwh: float
    gpu_kwh: float
    intensity: float  # grams of CO2e a kWh of the grid
    grid: str  # which grid, and where its figure is from
    hardware: str
    how: str  # measured, or estimated from what
    leaves_out: tuple[str, ...] = LEAVES_OUT

    @property
    def grams(self) -> float:
        """Grams of CO2e."""
        return self.kwh * self.intensity

    @property
    def watts(self) -> float:
        """The mean power."""
        return 3.6e6 * self.kwh / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return f"{1000 * self.kwh:.2g} Wh in {self.seconds:,.0f} s ({self.watts:.0f} W), {self.grams:.2g} g CO2e at {self.intensity:.0f} g/kWh ({self.grid}); {self.how}"


def grid(country: str | None = None) -> tuple[float, str]:
    """Grams of CO2e a kWh, and where the figure is from. `country`: three letters (ISO 3166), such as DEU; None: the world's mean."""
    if country is None:
        return WORLD
    mix = _tables().get_global_energy_mix_data()
    if not (about := mix.get(str(country).upper())):
        near = ", ".join(sorted(code for code in mix if code[:1] == str(country)[:1].upper())[:8])
        raise CourseError(f"No grid is known for {country!r}: give a country's three letters, such as DEU, or None for the world's mean. {near}".strip())
    return float(about["carbon_intensity"]), f"{about['country_name']} {about['year']}, codecarbon {metadata.version('codecarbon')}"


def measured(work: Callable[[], object], country: str | None = None) -> tuple[object, Used]:
    """Runs `work` and gives what it returns, and what the machine took meanwhile: all of it, whatever else runs beside.

    What `work` raises, an interrupt too, goes through. CourseError where codecarbon isn't installed or couldn't begin.
    """
    _tables()
    intensity, place = grid(country)
    with _quiet():
        from codecarbon import OfflineEmissionsTracker

        tracker = OfflineEmissionsTracker(
            country_iso_code=(country or "USA").upper(),  # it wants one; the intensity below is what counts
            force_carbon_intensity_g_co2e_kwh=intensity,
            output_methods=[],  # no file, no server; nor by an environment variable or a file of settings
            emissions_endpoint=None,
            electricitymaps_api_token=None,
            measure_power_secs=5,
            tracking_mode="machine",
            pue=1.0,
            log_level="critical",
        )
        tracker.start()
    try:
        result = work()
    finally:
        with _quiet():
            tracker.stop()
    data = getattr(tracker, "final_emissions_data", None)
    if data is None:
        raise CourseError("codecarbon could not look at this machine: take energy.estimated(seconds, cores) instead.")
    modes = {getattr(part, "_mode", type(part).__name__) for part in getattr(tracker, "_hardware", ())}
    how = "processor's energy counter read, memory estimated" if modes & set(COUNTERS) else "estimated from the processor's load and rating, and the memory's size"
    if data.gpu_count:
        how += "; GPU's own counter read"
    hardware = f"{data.cpu_count} threads of {data.cpu_model}, {data.ram_total_size:.0f} GB" + (f", {data.gpu_model}" if data.gpu_count else "")
    return result, Used(data.duration, data.energy_consumed, data.cpu_energy, data.ram_energy, data.gpu_energy, intensity, place, hardware, how)


def estimated(seconds: float, cores: int, of: int | None = None, country: str | None = None, core_watts: float = CORE_WATTS) -> Used:
    """What a run of so many seconds took, told afterwards: `cores` busy at `core_watts` W each, and their share of the memory's 20 W.

    of: cores of the machine (default: `cores`). A core's watts are codecarbon's for a processor that it doesn't know; a laptop's are half
    of that to the double, a desktop's up to ten times.
    """
    if not (seconds >= 0 and 0 < cores <= (of or cores) and core_watts > 0):
        raise CourseError("An estimate takes seconds, of a number of cores that the machine has, at more than 0 W each.")
    intensity, place = grid(country)
    hours = seconds / 3600
    cpu, memory = cores * core_watts * hours / 1000, MEMORY_WATTS * cores / (of or cores) * hours / 1000
    how = f"estimated from {seconds:,.0f} recorded seconds, {core_watts:g} W a core and {MEMORY_WATTS:g} W for the whole memory"
    return Used(seconds, cpu + memory, cpu, memory, 0.0, intensity, place, f"{cores} of {of or cores} cores", how)


def of_record(run: dict, country: str | None = None, core_watts: float = CORE_WATTS) -> Used:
    """What a recorded run (`scoreboard.recorded`) took to train, estimated from its seconds and kind of machine. CourseError for a GPU's."""
    found = re.match(r"(\d+) of (\d+) cores", str(run.get("machine")))
    if not found or "train_seconds" not in run:
        raise CourseError("This record doesn't hold seconds of training on cores: its energy can't be estimated. Measure a run: energy.measured().")
    return estimated(run["train_seconds"], int(found[1]), int(found[2]), country, core_watts)


def _tables():
    """codecarbon's tables of countries and sources."""
    try:
        from codecarbon.input import DataSource
    except ImportError:
        says = "Energy is measured with codecarbon, which isn't installed here (on Colab it can't be, beside the psutil there)"
        raise CourseError(f'{says}: pip install -c constraints.txt -e ".[energy]", or take energy.estimated(seconds, cores).') from None
    return DataSource()


@contextmanager
def _quiet():
    """codecarbon's log lines on machines without a counter are no news to a learner; the level holds from here on."""
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
