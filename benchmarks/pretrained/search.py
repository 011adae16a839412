"""Runs the arms in several processes on one device until the time is up.

    python -m benchmarks.pretrained.search --pilot FOLDER --data DIR --work DIR --device cuda --processes 8 --minutes 9

First steps are timed with nothing else running. Then arms are run; those of several Copilots beside the same Pilot
share its training. Each has its JSON file as soon as it is done, and arms whose files are there are not run again.
`--after FILE` goes on from a search that `report.py` stored, on another machine: its arms count as done, and its best
rates are taken. `report.py` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import statistics
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pretrained.arms import Arm, Result, plan
from benchmarks.pretrained.report import Results
from benchmarks.pretrained.running import Bench, Limits
from benchmarks.pretrained.tasks import TASKS, family


class Size(NamedTuple):
    """What makes the arms of a task slow: training rows, a step against one of MAWPS, seconds for its long rows."""

    rows: int
    slower: float
    likelihoods: float


SIZES = {"mawps": Size(1633, 1.0, 0.0), "gsm8k": Size(963, 1.6, 5.0)}
SIZES |= {"gsm8k-all": Size(6373, 1.6, 5.0), "commonsense": Size(2000, 1.6, 2.0), "lastfm": Size(6000, 1.6, 4.0)}
GRACE = 20.0  # seconds after the time is up until a process is ended
RETRIES = 1
LONG_ROWS = 5  # processes at most with a task of long rows, for the device's memory
LONG = {"gsm8k", "gsm8k-all", "commonsense", "lastfm"}
TIMING = 90.0  # seconds at most, to time the steps of a task
TOGETHER = 3  # arms beside one Pilot in one process
SOON = 12  # arms after the first that are looked at for that


def result_file(work: Path, name: str) -> Path:
    return work / "arms" / (re.sub(r"[^\w.-]+", "_", name) + ".json")


def check_limits(file: Path, limits: dict[str, Any]) -> None:
    """Arms are known by their names: raise a `ValueError` where a trial's are kept, of fewer rows or steps."""
    if file.is_file() and json.loads(file.read_text()) != limits:
        raise ValueError(
            f"{file.parent} holds arms of {file.read_text()}, not of {limits}: --work names another folder."
        )
    write(file, limits)


def write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(file)


def worker(connection: Connection, options: dict[str, Any]) -> None:
    """Runs what comes through the connection, one arm after the other, and sends back ("done" or "failed", text)."""
    import torch

    from benchmarks.pretrained.pilot import load

    torch.set_num_threads(1)
    if options["device"].startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    limits = Limits(options["rows"], options["steps"])
    bench = Bench(*load(options["pilot"], options["device"]), Path(options["data"]), limits)
    connection.send(("ready", ""))
    while (job := connection.recv()) is not None:
        try:
            if isinstance(job, list):
                for result in bench.run(job):
                    write(result_file(Path(options["work"]), result["name"]), result)
            else:
                write(Path(options["work"]) / f"timing_{job}.json", bench.time(job, **options["timing"]))
            connection.send(("done", ""))
        except Exception:
            connection.send(("failed", traceback.format_exc()))


@dataclass
class Worker:
    """A process and what it is doing."""

    process: multiprocessing.Process
    connection: Connection
    job: list[Arm] | str | None = None
    is_ready: bool = False
    begin: float = 0.0


@dataclass
class Search:
    """The arms that are done, and the processes that run the others."""

    options: dict[str, Any]
    tasks: list[str]
    deadline: float
    only: str = ""  # a regular expression
    results: list[Result] = field(default_factory=list)  # at first those of an earlier search
    started: set[str] = field(default_factory=set)  # names
    tries: dict[str, int] = field(default_factory=dict)  # that failed, by name
    failed: dict[str, Result] = field(default_factory=dict)  # by name, as the worst of results
    ratios: list[float] = field(default_factory=list)  # seconds over the estimate, of finished arms
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self):
        self.work = Path(self.options["work"])
        check_limits(self.work / "limits.json", {name: self.options[name] for name in ("rows", "steps")})
        for file in sorted((self.work / "arms").glob("*.json")):
            self.results.append(json.loads(file.read_text()))
        self.started |= {result["name"] for result in self.results}

    def start_worker(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(theirs, self.options), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def run(self, processes: int) -> None:
        self.workers = [self.start_worker() for _ in range(processes)]
        for task in dict.fromkeys(map(family, self.tasks)):
            if not (self.work / f"timing_{task}.json").is_file():
                self.time_alone(task)
        while True:
            self.hand_out()
            busy = [w for w in self.workers if w.job is not None or not w.is_ready]
            if not busy or time.monotonic() > self.deadline + GRACE:
                break
            by_connection = {w.connection: w for w in busy}
            for connection in wait(by_connection, timeout=1.0):
                self.hear(by_connection[connection])
        for w in self.workers:
            w.process.terminate()

    def hand_out(self) -> None:
        """Give every idle process the first arms that can end in time."""
        idle = [w for w in self.workers if w.is_ready and w.job is None]
        for w in idle:
            arms = self.next_arms()
            if not arms:
                return
            self.started |= {arm.name for arm in arms}
            self.give(w, arms)

    def give(self, w: Worker, job: list[Arm] | str) -> None:
        w.job, w.begin = job, time.monotonic()
        w.connection.send(job)

    def next_arms(self) -> list[Arm]:
        """The first that there is time for, and of those that come soon some beside the same Pilot."""
        left = self.deadline - time.monotonic()
        running = [w.job[0].task for w in self.workers if isinstance(w.job, list)]
        has_room = sum(task in LONG for task in running) < LONG_ROWS
        arms = self.open_arms(set() if has_room else LONG)
        found = list(islice((arm for arm in arms if self.estimate([arm]) <= left), 1))
        if found and found[0].name in self.tries:
            return found  # by itself
        for arm in islice(arms, SOON if found else 0):
            fits = len(found) < TOGETHER and arm.goes_with(found[0]) and arm.name not in self.tries
            if fits and self.estimate([*found, arm]) <= left:
                found.append(arm)
        return found

    def open_arms(self, full: set[str]) -> Iterator[Arm]:
        """Those that are to be run, in their order, but for tasks that run often enough."""
        known = {*self.started, *self.failed}
        for arm in plan([*self.results, *self.failed.values()], self.tasks):
            if arm.name not in known and re.search(self.only, arm.name) and arm.task not in full:
                known.add(arm.name)
                yield arm

    def estimate(self, arms: list[Arm]) -> float:
        """Seconds, by what the finished ones took."""
        if self.options["steps"]:
            return 0.0
        usual = sorted(self.ratios[-30:])
        ratio = usual[int(0.8 * (len(usual) - 1))] if usual else 1.5
        return ratio * work_of(arms)

    def hear(self, w: Worker) -> None:
        """Take a process's report; replace a process that died."""
        try:
            kind, text = w.connection.recv()
        except (EOFError, OSError):
            kind, text = "died", ""
        job, w.job = w.job, None
        if kind == "ready":
            w.is_ready = True
            return
        seconds = time.monotonic() - w.begin
        if isinstance(job, str):
            print(f"timing {job}: {kind} after {seconds:.1f} s\n{text}", flush=True)
        if isinstance(job, list):
            if kind == "done":
                self.ratios.append(seconds / work_of(job))
            for arm in job:
                self.close_arm(arm, kind, text, seconds)
        if kind == "died":
            w.process.join(1)
            print(f"a process ended with {w.process.exitcode}", flush=True)
            if time.monotonic() < self.deadline - 30 and sum(self.tries.values()) < 30:
                self.workers[self.workers.index(w)] = self.start_worker()
            else:
                self.workers.remove(w)

    def close_arm(self, arm: Arm, kind: str, text: str, seconds: float) -> None:
        left = self.deadline - time.monotonic()
        file = result_file(self.work, arm.name)
        if file.is_file():
            result = json.loads(file.read_text())
            self.results.append(result)
            print(f"{left:5.0f} s left | {seconds:5.1f} s | {summary(result)}", flush=True)
            return
        print(f"{left:5.0f} s left | {kind} after {seconds:.1f} s: {arm.name}\n{text[-1500:]}", flush=True)
        count = sum(self.tries.values())
        write(self.work / "failed" / f"{count}.json", {"name": arm.name, "error": text or kind})
        self.tries[arm.name] = self.tries.get(arm.name, 0) + 1
        if self.tries[arm.name] <= RETRIES:
            self.started.discard(arm.name)
        else:
            self.failed[arm.name] = {"name": arm.name, "arm": arm.settings(), "valid": {"nll": [math.inf]}}

    def time_alone(self, task: str) -> None:
        """Steps of a task, by the first process, when all have loaded and the others wait."""
        while not all(w.is_ready for w in self.workers):
            loading = {w.connection: w for w in self.workers if not w.is_ready}
            for connection in wait(loading):
                self.hear(loading[connection])
        if not self.workers:
            return
        w = self.workers[0]
        self.give(w, task)
        if not w.connection.poll(TIMING):
            w.process.terminate()
        self.hear(w)


def work_of(arms: list[Arm]) -> float:
    """About the seconds of arms beside one Pilot, which have the machine to themselves."""
    one, size = arms[0], SIZES[arms[0].task]
    steps = one.pilot.steps(size.rows) * size.slower
    copilots = [arm.copilot for arm in arms if arm.copilot is not None]
    rounds = sum(0.01 + 0.02 * copilot.steps for copilot in copilots)
    seconds = (0.05 if one.second else 0.025) * steps + rounds * steps
    seconds += sum(0.02 * copilot.steps * copilot.replays(size.rows) for copilot in copilots)
    for arm in arms:
        mixes = arm.copilot is not None or arm.second
        measuring = size.likelihoods + (6.0 if mixes else 3.0)
        measuring += (8.0 if mixes else 3.0) * arm.answers + (6.0 if mixes else 3.0) * arm.samples
        if arm.folds:  # two rates of folding, operator by operator, two of labels, and a fresh Copilot
            measuring = 4 * measuring + 0.6 * steps
        seconds += measuring
    return seconds


def summary(result: Result) -> str:
    """One line about an arm."""
    chosen, grid = list(map(tuple, result["chosen"].values())), list(map(tuple, result["grid"]))
    nll = [f"{result['test']['nll'][grid.index(weights)]:.4f}" for weights in ((1.0, 0.0), chosen[0])]
    right = [f"{100 * statistics.mean(g['right']):.1f} % at {tuple(g['weights'])}" for g in result.get("greedy", [])]
    return f"{result['name']}: valid {min(result['valid']['nll']):.4f}, test {' -> '.join(nll)} at {chosen[0]}; " + (
        ", ".join(right)
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pilot", default="pilot", help="folder or Hub id (see pilot.py)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", default="", help="a regular expression: arms in whose name it is found")
    parser.add_argument("--after", type=Path, help="a stored search to go on from")
    parser.add_argument("--rows", type=int, help="validation and test rows, to try things out")
    parser.add_argument("--steps", type=int, help="at most, to try things out")
    return parser.parse_args()


def main() -> None:
    begin, arguments = time.monotonic(), parse()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    names = ("pilot", "data", "work", "device", "rows", "steps")
    options = {name: getattr(arguments, name) for name in names}
    options |= {name: str(options[name]) for name in ("pilot", "data", "work")}
    options["timing"] = {"steps": 3, "skip": 1} if arguments.steps else {}
    tasks = [task for task in arguments.tasks if TASKS[task].is_in(arguments.data)]
    earlier = Results.read(arguments.after).arms if arguments.after else []
    search = Search(options, tasks, begin + 60 * arguments.minutes, arguments.only, earlier)
    search.run(arguments.processes)
    print(f"{len(search.results)} arms, {len(search.failed)} failed", flush=True)


if __name__ == "__main__":
    main()
