"""Runs the arms in several processes on one device until the time is up.

    python -m benchmarks.pretrained.search --pilot FOLDER --data DIR --work DIR --device cuda --processes 8 --minutes 9

Writes one JSON file for every arm as soon as it is done, and at the end timing.json, measured with nothing else
running. Arms whose files are there already are not run again. `report.py` makes the tables.
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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pretrained.arms import Arm, Result, plan
from benchmarks.pretrained.running import Bench, Limits
from benchmarks.pretrained.tasks import TASKS


class Size(NamedTuple):
    """What makes the arms of a task slow: training rows, a step against one of MAWPS, seconds for its long rows."""

    rows: int
    slower: float
    likelihoods: float


TIMING_SECONDS = {"mawps": 18.0, "gsm8k": 9.0}  # what the solo timing takes about
SIZES = {"mawps": Size(1671, 1.0, 0.0), "gsm8k": Size(1000, 1.6, 5.0)}
GRACE = 20.0  # seconds after the time is up until a process is ended
RETRIES = 1
AT_ONCE = {"gsm8k": 4}  # arms of a task with long rows, for the device's memory


def result_file(work: Path, name: str) -> Path:
    return work / "arms" / (re.sub(r"[^\w.-]+", "_", name) + ".json")


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
            if isinstance(job, Arm):
                for result in bench.run(job):
                    write(result_file(Path(options["work"]), job.name), result)
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
    job: Arm | str | None = None
    is_ready: bool = False
    begin: float = 0.0


@dataclass
class Search:
    """The arms that are done, and the processes that run the others."""

    options: dict[str, Any]
    tasks: list[str]
    deadline: float
    only: str = ""
    results: list[Result] = field(default_factory=list)
    started: set[str] = field(default_factory=set)  # names
    tries: dict[str, int] = field(default_factory=dict)  # that failed, by name
    failed: dict[str, Result] = field(default_factory=dict)  # by name, as the worst of results
    ratios: list[float] = field(default_factory=list)  # seconds over the estimate, of finished arms
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self):
        self.work = Path(self.options["work"])
        for file in sorted((self.work / "arms").glob("*.json")):
            self.results.append(json.loads(file.read_text()))
            self.started.add(self.results[-1]["name"])

    @property
    def arms_end(self) -> float:
        """When the arms must be done, so that there is time for the timing."""
        share = 0.5 if self.options["steps"] else 1.0
        return self.deadline - share * sum(TIMING_SECONDS[task] for task in self.tasks)

    def start_worker(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(theirs, self.options), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def run(self, processes: int) -> None:
        self.workers = [self.start_worker() for _ in range(processes)]
        while True:
            self.hand_out()
            busy = [w for w in self.workers if w.job is not None or not w.is_ready]
            if not busy or time.monotonic() > self.arms_end + GRACE:
                break
            by_connection = {w.connection: w for w in busy}
            for connection in wait(by_connection, timeout=1.0):
                self.hear(by_connection[connection])
        self.time_alone()

    def hand_out(self) -> None:
        """Give every idle process the first arm that can end in time."""
        idle = [w for w in self.workers if w.is_ready and w.job is None]
        for w in idle:
            arm = self.next_arm()
            if arm is None:
                return
            self.started.add(arm.name)
            self.give(w, arm)

    def give(self, w: Worker, job: Arm | str) -> None:
        w.job, w.begin = job, time.monotonic()
        w.connection.send(job)

    def next_arm(self) -> Arm | None:
        left = self.arms_end - time.monotonic()
        running = [w.job.task for w in self.workers if isinstance(w.job, Arm)]
        full = {task for task, most in AT_ONCE.items() if running.count(task) >= most}
        for arm in plan([*self.results, *self.failed.values()], self.tasks):
            is_new = arm.name not in self.started and arm.name not in self.failed
            if is_new and self.only in arm.name and arm.task not in full and self.estimate(arm) <= left:
                return arm
        return None

    def estimate(self, arm: Arm) -> float:
        """Seconds, by what the finished ones took."""
        if self.options["steps"]:
            return 0.0
        usual = sorted(self.ratios[-30:])
        ratio = usual[int(0.8 * (len(usual) - 1))] if usual else 1.5
        return ratio * work_of(arm)

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
        if isinstance(job, Arm):
            self.close_arm(job, kind, text, seconds)
        if kind == "died":
            w.process.join(1)
            print(f"a process ended with {w.process.exitcode}", flush=True)
            if time.monotonic() < self.arms_end - 30 and sum(self.tries.values()) < 30:
                self.workers[self.workers.index(w)] = self.start_worker()
            else:
                self.workers.remove(w)

    def close_arm(self, arm: Arm, kind: str, text: str, seconds: float) -> None:
        left = self.deadline - time.monotonic()
        if kind == "done":
            result = json.loads(result_file(self.work, arm.name).read_text())
            self.results.append(result)
            self.ratios.append(seconds / work_of(arm))
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

    def time_alone(self) -> None:
        """The solo timing, with every other process idle or gone."""
        for w in self.workers:
            if w.job is not None or not w.is_ready:
                w.process.terminate()
        free = [w for w in self.workers if w.job is None and w.is_ready]
        for w in free[1:]:
            w.connection.send(None)
        for w in free[1:]:
            w.process.join(5)
        for task in self.tasks if free else ():
            self.give(free[0], task)
            left = self.deadline + GRACE - time.monotonic()
            if not free[0].connection.poll(max(left, 1.0)):
                free[0].process.terminate()
                print(f"no time for the timing of {task}", flush=True)
                return
            print(f"timing {task}: {free[0].connection.recv()[0]}", flush=True)
        if free:
            free[0].connection.send(None)


def work_of(arm: Arm) -> float:
    """About the seconds of an arm that has the machine to itself."""
    size = SIZES[arm.task]
    step = 0.03
    if arm.copilot is not None:
        step += 0.01 + 0.03 * arm.copilot.steps
    twice = 2 if arm.second else 1
    training = twice * arm.pilot.steps(size.rows) * size.slower * step
    if arm.copilot is not None:
        training += 0.03 * arm.copilot.steps * arm.copilot.replays(size.rows) * size.slower
    is_alone = arm.copilot is None and not arm.second
    measuring = size.likelihoods + (3.0 if is_alone else 6.0)
    if arm.folds:  # two rates of folding, eager, two of labels, and a fresh Copilot
        training += arm.pilot.steps(size.rows) * size.slower * (0.4 + 0.06 + 0.16)
        measuring *= 4
    if arm.answers:
        measuring += 3.0 if is_alone else 8.0
    if arm.samples:
        measuring += 3.0 if is_alone else 6.0
    return training + twice * measuring


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
    parser.add_argument("--only", default="", help="arms whose name has this text")
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
    search = Search(options, arguments.tasks, begin + 60 * arguments.minutes, arguments.only)
    search.run(arguments.processes)
    print(f"{len(search.results)} arms, {len(search.failed)} failed", flush=True)


if __name__ == "__main__":
    main()
