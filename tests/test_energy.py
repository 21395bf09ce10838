"""Energy: measured around a piece of work without a trace, estimated from recorded seconds, with the grid's figure and what is left out."""

import builtins
import logging
import signal
import threading
import time

import pytest

from helpers import scoreboard
from helpers.files import CourseError
from helpers.shipping import energy


def test_work_is_measured_without_a_file_a_line_or_a_thread_left(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODECARBON_OUTPUT_METHODS", "csv")  # neither an environment nor a file of settings changes that
    monkeypatch.setenv("CODECARBON_SAVE_TO_FILE", "true")
    handler = signal.getsignal(signal.SIGINT)
    result, used = energy.measured(lambda: time.sleep(0.3) or "done", country="DEU")
    assert result == "done" and 0.3 <= used.seconds < 60
    assert used.kwh == pytest.approx(used.cpu_kwh + used.memory_kwh + used.gpu_kwh) and 0 < used.watts < 5000
    assert used.grams == pytest.approx(used.kwh * used.intensity) and used.grid.startswith("Germany 20") and "codecarbon" in used.grid
    assert ("estimated" in used.how or "counter" in used.how) and "threads of" in used.hardware
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGINT) is handler and logging.getLogger("codecarbon").level == logging.CRITICAL
    assert not [thread for thread in threading.enumerate() if thread is not threading.main_thread() and "Thread" in thread.name and thread.daemon is False]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_the_work_raises_goes_through_and_the_tracker_stops(error):
    from codecarbon import OfflineEmissionsTracker

    stopped, stop = [], OfflineEmissionsTracker.stop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OfflineEmissionsTracker, "stop", lambda self: stopped.append(stop(self)))

        def fails():
            raise error

        with pytest.raises(type(error)):
            energy.measured(fails)
    assert len(stopped) == 1


def test_a_tracker_that_could_not_begin_is_told(monkeypatch):
    from codecarbon import OfflineEmissionsTracker

    monkeypatch.setattr(OfflineEmissionsTracker, "start", lambda self: None)
    with pytest.raises(CourseError, match="could not look at this machine: take energy.estimated"):
        energy.measured(lambda: 1)


def test_an_estimate_is_arithmetic_that_anyone_can_do():
    used = energy.estimated(3600, 2, country="FRA")
    assert (used.cpu_kwh, used.memory_kwh, used.kwh) == (0.008, 0.02, 0.028) and used.watts == pytest.approx(28)
    assert used.grams == pytest.approx(0.028 * energy.grid("FRA")[0])
    half = energy.estimated(3600, 1, of=2, core_watts=10)
    assert (half.cpu_kwh, half.memory_kwh) == (0.01, 0.01)
    assert str(half).startswith("20 Wh in 3,600 s (20 W), 9.5 g CO2e at 475 g/kWh (world mean of 2018, IEA); estimated from 3,600 recorded seconds, 10 W a core")


@pytest.mark.parametrize("wrong", [{"seconds": -1, "cores": 1}, {"seconds": 1, "cores": 0}, {"seconds": 1, "cores": 3, "of": 2}, {"seconds": 1, "cores": 1, "core_watts": 0}])
def test_an_estimate_of_nonsense_is_refused(wrong):
    with pytest.raises(CourseError, match="An estimate takes seconds"):
        energy.estimated(**wrong)


def test_a_recorded_run_can_be_told_afterwards():
    run = scoreboard.recorded("sft")[0]
    used = energy.of_record(run)
    assert used.seconds == run["train_seconds"] and used.hardware == "1 of 2 cores" and 0 < used.kwh < 0.1
    for other in ({"machine": "NVIDIA H200", "train_seconds": 5}, {"machine": "1 of 2 cores"}, {}):
        with pytest.raises(CourseError, match="doesn't hold seconds of training on cores"):
            energy.of_record(other)


def test_the_grids_figures_are_codecarbons_with_their_source():
    from codecarbon.input import DataSource

    sources = DataSource().get_carbon_intensity_per_source_data()
    assert energy.grid() == (sources["world_average"], "world mean of 2018, IEA") and "iea.org" in sources["world_average_source"] and "2019" in sources["world_average_source"]
    assert energy.grid("fra")[0] < 100 < energy.grid("DEU")[0]
    with pytest.raises(CourseError, match="No grid is known for 'DE': give a country's three letters"):
        energy.grid("DE")


def test_without_codecarbon_one_is_told_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name.startswith("codecarbon"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(CourseError, match=r'pip install -c constraints.txt -e ".\[energy\]"'):
        energy.measured(lambda: 1)
    with pytest.raises(CourseError, match="which isn't installed here"):
        energy.grid("DEU")
    assert energy.estimated(60, 1).intensity == 475  # needs nothing
