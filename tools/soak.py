"""Kill parts of a running demo, one after another at random points, resume by the same command each time, and prove what was trained.

    python tools/soak.py --kills 20 --seed 0 --hosts 2        # prints a table, writes tools/bench/results/cpu/soak.json

Every attempt is `igpo launch` on each host (network namespaces on this machine; `--hosts 1` needs none). A fault is one of: a rank, an
engine, Ray's head (gcs_server), a raylet, torchrun's agent or a launcher killed by SIGKILL, or a host cut off the network. The run goes
on or stops with a sentence on every host; then the same command is given again. At the end the questions in the rollout files are
compared with those that the question stream promises: none lost, none trained twice, and no process left behind.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pyarrow.parquet as pq

import demo_data
import hosts
import world_facts
from igpo_megatron.config.load import load
from igpo_megatron.config.schema import Config
from igpo_megatron.data.prompts import PromptStream
from igpo_megatron.observability.metrics_file import read_metrics
from igpo_megatron.observability.run_folder import write_whole
from igpo_megatron.supervision.leftovers import is_alive

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "tools/bench/results/cpu/soak.json"
VERDICTS = {"lost": "lost", "repeated": "trained twice", "left_behind": "processes left behind"}
PATIENCE_S = 40
"""Ray's agents look five times, two seconds apart, before they believe that their raylet is dead."""

STARTUP_SHARE = 0.2
"""Of the kills hit a job that has not made a step yet."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is killed."""

    name: str
    match: str
    """Name of the process, or one word of its command line; empty for the host's network."""

    on_head: bool = False
    """Only on host 0; otherwise on a host drawn by chance."""

    needs_hosts: bool = False
    """Nothing of the kind exists where one host is all: its launcher is torchrun's agent itself."""


FAULTS = (
    Fault("rank", "igpo_megatron.launch.rank"),
    Fault("engine", "VLLM::EngineCore"),
    Fault("Ray head", "gcs_server", on_head=True),
    Fault("raylet", "raylet"),
    Fault("torchrun agent", "igpo_megatron.launch.agent", needs_hosts=True),
    Fault("launcher", "igpo_megatron.cli"),
    Fault("host cut off", "", needs_hosts=True),
)


@dataclass(slots=True)
class Kill:
    """One line of the table."""

    number: int
    fault: str
    host: int
    delay_s: float
    step: int
    """Last step that was saved when it happened."""

    outcome: str = ""
    """`went on`, or `stopped`."""

    ended_s: float = 0.0
    """From the fault to the end of the last launcher."""

    codes: list[int | None] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    """What each host printed about it."""


# ---- what was trained


def trained_questions(run: Path, steps: int) -> Counter[str]:
    """How often each question was trained in the first `steps`: the rollout files hold every step that counts, a repeated step once."""
    found: Counter[str] = Counter()
    for path in sorted((run / "rollouts").glob("step_*.parquet")):
        if int(path.stem[5:]) > steps:
            continue  # it was not saved, and will be trained again
        found.update(prompt["id"] for prompt in pq.read_table(path, columns=["prompt"])["prompt"].to_pylist())
    return found


def expected_questions(config: Config, steps: int) -> Counter[str]:
    """What a run that nobody disturbs trains in `steps`: the first steps x prompts_per_step questions of its stream."""
    data = config.data
    stream = PromptStream(data.train, seed=config.run.seed, shuffle=data.shuffle, balance=data.balance, layout=data.layout)
    return Counter(stream.question(ordinal).id for ordinal in stream.draw(steps * config.rollout.prompts_per_step))


def difference(trained: Counter[str], expected: Counter[str]) -> dict[str, list[str]]:
    """Questions lost and questions trained too often, each as often as it was."""
    return {"lost": sorted((expected - trained).elements()), "repeated": sorted((trained - expected).elements())}


# ---- one job on all hosts


class Job:
    """`igpo launch` on every host, with whatever it has started."""

    def __init__(self, network: hosts.Hosts | None, count: int, arguments: Sequence[str], logs: Path, environment: dict[str, str]) -> None:
        """`arguments`: of `igpo launch`, whose nodes they do not number."""
        self.logs = [logs / f"host{number}.log" for number in range(count)]
        self.seen: list[dict[int, psutil.Process]] = [{} for _ in range(count)]
        self.launchers = []
        for number, log in enumerate(self.logs):
            command = [sys.executable, "-m", "igpo_megatron.cli", "launch", *arguments, "--nodes", str(count), "--node-rank", str(number)]
            if network is not None:
                command = network.command(number, [*command, "--head", network.address(0)])
            with log.open("w") as file:
                self.launchers.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT))

    @property
    def running(self) -> bool:
        """Some launcher has not ended."""
        self._look()
        return any(process.poll() is None for process in self.launchers)

    def wait(self, happened: Callable[[], bool], timeout_s: float) -> bool:
        """Until it happened; False where the job or the time ended first."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            if not self.running or time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def kill(self, fault: Fault, host: int) -> bool:
        """SIGKILL a process of that kind on a host; False where there is none."""
        self._look()
        for process in self.seen[host].values():
            try:
                if process.is_running() and fault.match in (process.name(), *process.cmdline()):
                    process.send_signal(signal.SIGKILL)
                    return True
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return False

    def sentences(self) -> list[str]:
        """What each host said at last: how it ended, or of an engine that is started again; otherwise its last line."""
        found = []
        for log in self.logs:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            said = [line for line in lines if line.startswith(("stopped: ", "error: ")) or "; restart " in line]
            found.append((said or lines or [""])[-1])
        return found

    def left_behind(self) -> list[str]:
        """Command lines of processes that outlived their launcher; they are ended."""
        alive = [one for seen in self.seen for one in seen.values() if is_alive(one)]
        _, alive = psutil.wait_procs(alive, timeout=PATIENCE_S)
        names = []
        for process in alive:
            try:
                names.append(" ".join(process.cmdline())[:120])
                process.kill()
            except psutil.NoSuchProcess:
                continue
        return names

    def end(self) -> None:
        """SIGKILL everything."""
        self._look()
        for seen in self.seen:
            for process in seen.values():
                if process.is_running():
                    process.kill()
        for launcher in self.launchers:
            launcher.wait()

    def _look(self) -> None:
        for launcher, seen in zip(self.launchers, self.seen, strict=True):
            try:
                own = psutil.Process(launcher.pid)
                seen.update({one.pid: one for one in [own, *own.children(recursive=True)]})
            except psutil.NoSuchProcess:
                continue


def saved_step(run: Path) -> int:
    """Newest complete checkpoint; 0 for none."""
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step_??????/state.json")), default=0)


@dataclass(slots=True)
class Trial:
    """A run that is killed and started again, by the same command each time, until it has finished; and what was done to it."""

    arguments: Sequence[str]
    """Configuration and overrides."""

    run: Path
    kills: int
    seed: int
    count: int
    """Hosts."""

    patience_s: float
    """For a start, a step or an end."""

    until: float
    """No kill after it (monotonic)."""

    faults: Sequence[Fault]
    logs: Path
    rendezvous: str
    """How torchrun's agents meet."""

    network: hosts.Hosts | None = None
    _token: str = field(default_factory=lambda: secrets.token_hex(16))
    _job: Job | None = None
    _starts: int = 0
    _done: list[Kill] = field(default_factory=list)
    _left: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def soak(self, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Kill, resume, finish; the result as JSON-able data, told to `report` after every kill, too."""
        rng = random.Random(self.seed)
        with ExitStack() as stack:
            self.network = stack.enter_context(hosts.Hosts(self.count)) if self.count > 1 else None
            stack.callback(self.end)
            order: list[Fault] = []
            possible = [fault for fault in self.faults if self.count > 1 or not fault.needs_hosts]
            while self.goes_on:
                self.start()
                while self.job.running and self.goes_on:
                    order = order or rng.sample(possible, len(possible))  # all kinds come equally often
                    self.kill(rng, order.pop())
                    report(self.result())
            self.finish()
            return self.result()

    @property
    def job(self) -> Job:
        assert self._job is not None, "nothing was started"
        return self._job

    @property
    def _finished(self) -> bool:
        return (self.run / "summary.json").exists()

    @property
    def goes_on(self) -> bool:
        """There is more to kill, and time for it."""
        return len(self._done) < self.kills and time.monotonic() < self.until and not self._finished

    def start(self) -> None:
        """The command, given once more on every host."""
        self._starts += 1
        folder = self.logs / f"start_{self._starts:02d}"
        folder.mkdir(parents=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": self._token, "HF_HUB_OFFLINE": "1"}
        self._job = Job(self.network, self.count, [*self.arguments, "--rendezvous", self.rendezvous], folder, environment)

    def end(self) -> None:
        """End whatever runs."""
        if self._job is not None:
            self._job.end()

    def kill(self, rng: random.Random, fault: Fault) -> None:
        """Wait for a random point, do one thing, and see what becomes of the job. SystemExit where it stops by itself, or hangs."""
        before = saved_step(self.run)
        early = rng.random() < STARTUP_SHARE
        host, delay_s = rng.randrange(self.count), rng.uniform(0.0, 10.0)
        host = 0 if fault.on_head else host
        if not early and not self.job.wait(lambda: saved_step(self.run) > before, self.patience_s):
            self._give_up("without a new step")
        until = time.monotonic() + delay_s
        self.job.wait(lambda: time.monotonic() > until, delay_s + 1)
        if fault.match:
            # A kind that is not running there yet is waited for; a kind that this host never has is looked for on the others.
            places = [host, *(other for other in range(self.count) if other != host)]
            hit: list[int] = []

            def struck() -> bool:
                hit.extend(islice((place for place in places if self.job.kill(fault, place)), 1))
                return bool(hit)

            if not self.job.wait(struck, self.patience_s):
                self._give_up(f"with nothing to kill that is a {fault.name}")
            host = hit[0]
        else:
            assert self.network is not None
            self.network.cut(host)
        began, step = time.monotonic(), saved_step(self.run)
        kill = Kill(len(self._done) + 1, fault.name, host, round(delay_s, 1), step)
        went_on = self.job.wait(lambda: saved_step(self.run) >= step + 2, self.patience_s)
        if not went_on and self.job.running:
            self._give_up(f"after {fault.name} on host {host}")
        kill.outcome = "went on" if went_on else "stopped"
        kill.ended_s = round(time.monotonic() - began, 1)
        kill.codes = [process.poll() for process in self.job.launchers]
        kill.sentences = self.job.sentences()
        if not fault.match and self.network is not None:
            self.network.join(host)
        self._done.append(kill)
        if not went_on:
            self._left += self.job.left_behind()
        print(line(kill), flush=True)

    def finish(self) -> None:
        """Undisturbed, to the last step. SystemExit where that fails."""
        if self._job is None or not self._job.running:
            if self._finished:
                return
            self.start()
        if not self.job.wait(lambda: self._finished, self.patience_s * 4) and not self._finished:
            self._give_up("undisturbed")
        self.job.wait(lambda: False, self.patience_s)
        self._left += self.job.left_behind()

    def result(self) -> dict[str, Any]:
        """Of the steps that were saved so far."""
        config = load(self.arguments[0], list(self.arguments[1:]))
        steps = saved_step(self.run)
        expected, trained = expected_questions(config, steps), trained_questions(self.run, steps)
        rows = read_metrics(self.run / "metrics.jsonl") if (self.run / "metrics.jsonl").exists() else []
        return {
            "seed": self.seed,
            "hosts": self.count,
            "rendezvous": self.rendezvous,
            "finished": self._finished,
            "steps": steps,
            "steps_logged": len({int(row["step"]) for row in rows if 0 < row["step"] <= steps}),
            "questions": sum(expected.values()),
            **difference(trained, expected),
            "left_behind": self._left,
            "starts": self._starts,
            "seconds": round(time.monotonic() - self._began),
            "kills": [asdict(kill) for kill in self._done],
        }

    def _give_up(self, what: str) -> NoReturn:
        state = f"nothing happened within {self.patience_s:g} s" if self.job.running else "the job ended"
        logs = "\n".join(f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in self.job.logs)
        raise SystemExit(f"start {self._starts}, {what}: {state}, last saved step {saved_step(self.run)}\n{logs}")


def line(kill: Kill) -> str:
    """One row of the table, and below it what each host said."""
    head = f"{kill.number:>3}  {kill.fault:<15} host {kill.host}  after step {kill.step:<3} {kill.outcome:<8} {kill.ended_s:6.1f} s"
    return "\n".join([head, *(f"       host {number}: {text[:160]}" for number, text in enumerate(kill.sentences))])


def demo_arguments(folder: Path, steps: int) -> list[str]:
    """The demo at tiny size with data of its own below `folder`."""
    demo_data.write(world_facts.build(), folder)
    return [
        str(ROOT / "examples/quickstart/igpo.yaml"),
        "run.name=soak",
        f"run.folder={folder}",
        f"run.steps={steps}",
        f"model.path={ROOT / 'examples/quickstart/policy'}",
        f"search.corpus={folder / 'corpus.jsonl'}",
        f"data.train=[{folder / 'train.parquet'}]",
        "data.eval=[]",
        "eval.at_ends=false",
        "rollout.prompts_per_step=3",
        "rollout.samples_per_prompt=4",
        "rollout.engine.kv_cache_mib=64",
        "checkpoint.every=1",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where nothing was lost, repeated or left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=2, help="network namespaces; 1 for none")
    parser.add_argument("--rendezvous", choices=("c10d", "static"), default="c10d", help="how torchrun's agents meet")
    parser.add_argument("--steps", type=int, help="default: seven for each kill, so that the run outlasts them")
    parser.add_argument("--faults", nargs="*", choices=[fault.name for fault in FAULTS], help="only these; default: all")
    parser.add_argument("--patience-s", type=float, default=600, help="for a start, a step or an end")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no kill after that; the steps that are left are trained in peace")
    parser.add_argument("--logs", type=Path, help="keep what every start printed here; default: nowhere")
    parser.add_argument("--out", type=Path, default=RESULT, help="written after every kill")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    options = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if not options.faults or fault.name in options.faults]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and what was started ends, as with Ctrl-C

    known = json.loads(options.out.read_text(encoding="utf-8"))["figures"] if options.out.is_file() else {}

    def write(result: dict[str, Any]) -> None:
        versions = {name: version(name) for name in ("torch", "megatron-core", "ray")}
        figures = {**known, f"hosts_{options.hosts}": result}
        record = {"name": options.out.stem, "device": "cpu", "figures": figures, "floors": dict.fromkeys(VERDICTS, 0), "versions": versions}
        write_whole(options.out, json.dumps(record, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="igpo-soak-") as folder:
        trial = Trial(
            arguments=[*demo_arguments(Path(folder), options.steps or 7 * options.kills + 2), *options.overrides],
            run=Path(folder) / "soak",
            kills=options.kills,
            seed=options.seed,
            count=options.hosts,
            patience_s=options.patience_s,
            until=time.monotonic() + 60 * options.minutes,
            faults=faults,
            logs=options.logs or Path(folder) / "logs",
            rendezvous=options.rendezvous,
        )
        result = trial.soak(write)
    write(result)
    good = not any(result[key] for key in VERDICTS) and len(result["kills"]) == options.kills
    found = ", ".join(f"{len(result[key])} {words}" for key, words in VERDICTS.items())
    print(f"{len(result['kills'])} kills, {result['questions']} questions: {found}; {options.out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
