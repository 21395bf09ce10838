"""The notebooks: where they are, which there are, and how one is executed from a fresh kernel, with a live line for each cell."""

import asyncio
import os
import platform
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from helpers.files import CourseError, write_whole
from helpers.runtime import ROOT, runs_dir

NOTEBOOKS = ROOT / "notebooks"
CORE = ("00_start_here", "01_quantized_loading", "02_lora_injection", "03_sft_with_trl", "04_dpo")
EVERY = 60  # seconds from line to line where there is no terminal that shows a live one


def all_notebooks() -> list[str]:
    """The lessons in order, then the solutions of their exercises, by their paths in notebooks/ without the ending."""
    return [path.relative_to(NOTEBOOKS).with_suffix("").as_posix() for place in ("*", "solutions/*") for path in sorted(NOTEBOOKS.glob(f"{place}.ipynb"))]


def known(names: list[str]) -> list[str]:
    """The notebooks of these names, all without one; CourseError for a name that none has."""
    if strange := sorted(set(names) - set(all_notebooks())):
        raise CourseError(f"There is no notebook {strange[0]!r}: there are {', '.join(all_notebooks())}.")
    return names or all_notebooks()


def clean_outputs(notebook) -> None:
    """Leaves in stored outputs only what a reader needs: no widget debris, no machine-dependent metadata."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}


def progress_line(where: str, seconds: float, inside: str = "", ending: str = "") -> str:
    """One line on a notebook that is executed: how far it is, the time gone, what the bar inside the cell says."""
    return f"{where}  {int(seconds // 60)}:{int(seconds % 60):02d}{inside and f'  {inside}'}{ending}"


def measured(seconds: float) -> dict:
    """What a run took, on what kind of machine, and how fast that multiplies matrices."""
    import torch

    from helpers import times

    at = asdict(times.rates())
    kind, dtype = at.pop("kind"), at.pop("dtype")
    rates = {name: float(f"{rate:.3g}") for name, rate in at.items()}
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"seconds": round(seconds), "cores": os.cpu_count(), "machine": machine, "kind": kind, "dtype": dtype, "rates": rates}


def run_whole(client, **options) -> None:
    """Runs a notebook's client to its end. Ctrl-C ends its kernel and comes through as KeyboardInterrupt.

    In a thread, since in the main one nbclient takes Ctrl-C for itself, and then fails for want of the kernel that it has shut down.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(client.async_execute(**options))
    try:
        with ThreadPoolExecutor(1) as beside:
            try:
                beside.submit(loop.run_until_complete, task).result()
            except KeyboardInterrupt:
                client.shutdown_kernel = "immediate"
                loop.call_soon_threadsafe(task.cancel)
                raise
    finally:
        loop.run_until_complete(_none_left())
        loop.close()


async def _none_left() -> None:
    """Cancels what else runs in this loop, and waits for its end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def execute(name: str, target: Path | None = None) -> None:
    """Executes a notebook from a fresh kernel with a live line a cell; saves it to `target` (None: in place)."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cells = sum(c.cell_type == "code" for c in notebook.cells)
    start, done, live, over = time.perf_counter(), 0, sys.stdout.isatty(), threading.Event()
    inside = runs_dir() / "notebooks" / f"{name.replace('/', '-')}.progress"  # what a bar in the kernel says

    def show(ending=""):
        said = inside.read_text(encoding="utf-8") if inside.exists() and not ending else ""
        line = progress_line(f"{name}  cell {done}/{cells}", time.perf_counter() - start, said, ending)
        if live:
            width = shutil.get_terminal_size().columns - 1
            line = f"\r{line[:width]:{width}}"
        print(line, end="" if live and not ending else "\n", flush=True)

    def tick():
        while not over.wait(1 if live else EVERY):
            show()

    def on_cell(**_):
        nonlocal done
        done += 1
        show()

    os.environ["COURSE_PROGRESS"] = "0"  # bars are for people; a stored notebook keeps none
    quiet = ["--log-level=ERROR"]  # the kernel's own advice on encryption between it and this process
    place = {"metadata": {"path": str((NOTEBOOKS / name).parent)}}
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", extra_arguments=quiet, resources=place, on_cell_execute=on_cell)
    threading.Thread(target=tick, daemon=True).start()
    try:
        run_whole(client, env=os.environ | {"COURSE_PROGRESS_FILE": str(inside)})
    except CellExecutionError as error:
        failed = runs_dir() / "notebooks" / f"{name}.failed.ipynb"
        write_whole(failed, nbformat.writes(notebook))
        raise CourseError(
            f"{name} stopped in cell {done} of {cells} ({failed.name} under runs/notebooks/ has the rest): {str(error)[-1500:]}"
        ) from None
    finally:
        over.set()
        inside.unlink(missing_ok=True)
    notebook.metadata["measured"] = measured(time.perf_counter() - start)  # for make timings
    clean_outputs(notebook)
    write_whole(target or NOTEBOOKS / f"{name}.ipynb", nbformat.writes(notebook) + "\n")
    show("  done")
