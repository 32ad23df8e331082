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
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

import hosts
import prepare_data
import world_facts
from igpo_megatron.config.load import load
from igpo_megatron.config.schema import Config
from igpo_megatron.data.prompts import PromptStream
from igpo_megatron.observability.tracker import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "tools/bench/results/cpu/soak.json"
VERDICTS = {"lost": "lost", "repeated": "trained twice", "left_behind": "processes left behind"}
STARTUP_SHARE = 0.2
"""Of the kills hit a job that has not made a step yet."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is killed: a process whose command line or name holds a text; the empty text is the host's network."""

    name: str
    match: str
    on_head: bool | None = None
    """True: only on host 0; None: on a host drawn by chance."""


FAULTS = (
    Fault("rank", "igpo_megatron.train"),
    Fault("engine", "VLLM::EngineCore"),
    Fault("Ray head", "gcs_server", on_head=True),
    Fault("raylet", "raylet/raylet"),
    Fault("torchrun agent", "igpo_megatron.launch.agent"),
    Fault("launcher", "igpo_megatron.cli launch"),
    Fault("host cut off", ""),
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
    """The last line that each host printed."""


# ---- what was trained


def trained_questions(run: Path) -> Counter[str]:
    """How often each question was trained: the rollout files hold every step that counts, a repeated step once."""
    found: Counter[str] = Counter()
    for path in sorted((run / "rollouts").glob("step_*.parquet")):
        found.update(prompt["id"] for prompt in pq.read_table(path, columns=["prompt"])["prompt"].to_pylist())
    return found


def expected_questions(config: Config) -> Counter[str]:
    """What a run that nobody disturbs trains: the first steps x prompts_per_step questions of its stream."""
    stream = PromptStream(config.data.train, seed=config.run.seed, shuffle=config.data.shuffle, balance=config.data.balance)
    return Counter(stream.question(ordinal).id for ordinal in stream.draw(config.run.steps * config.rollout.prompts_per_step))


def difference(trained: Counter[str], expected: Counter[str]) -> dict[str, list[str]]:
    """Questions lost and questions trained too often, each as often as it was."""
    return {"lost": sorted((expected - trained).elements()), "repeated": sorted((trained - expected).elements())}


# ---- one job on all hosts


class Job:
    """`igpo launch` on every host, with whatever it has started."""

    def __init__(self, network: hosts.Hosts | None, count: int, arguments: Sequence[str], logs: Path, environment: dict[str, str]) -> None:
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
            time.sleep(0.1)
        return True

    def kill(self, fault: Fault, host: int) -> bool:
        """SIGKILL a process of that kind on a host; False where there is none."""
        self._look()
        for process in self.seen[host].values():
            try:
                if process.is_running() and fault.match in " ".join([process.name(), *process.cmdline()]):
                    process.send_signal(signal.SIGKILL)
                    return True
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return False

    def last_lines(self) -> list[str]:
        """What each host printed last."""
        return [next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "") for log in self.logs]

    def left_behind(self) -> list[str]:
        """Command lines of processes that outlived their launcher; they are ended."""
        alive = [one for seen in self.seen for one in seen.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        _, alive = psutil.wait_procs(alive, timeout=15)
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


def soak(
    arguments: Sequence[str],
    run: Path,
    *,
    kills: int,
    seed: int,
    count: int,
    patience_s: float,
    faults: Sequence[Fault] = FAULTS,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Kill, resume, finish; the result as JSON-able data. `arguments`: configuration and overrides; `patience_s`: for a start or an end."""
    rng = random.Random(seed)
    token = secrets.token_hex(16)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": token, "HF_HUB_OFFLINE": "1", **(environment or {})}
    done: list[Kill] = []
    left: list[str] = []
    began = time.monotonic()
    with ExitStack() as stack:
        network = stack.enter_context(hosts.Hosts(count)) if count > 1 else None
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="igpo-soak-")))
        possible = [fault for fault in faults if fault.match or network is not None]
        while len(done) < kills:
            job = Job(network, count, arguments, logs, environment)
            stack.callback(job.end)
            while job.running and len(done) < kills:
                kill = _one_kill(job, network, rng, possible, run, count, len(done) + 1, patience_s)
                if kill is None:
                    break  # it ended, or made no step, without our doing
                done.append(kill)
                print(line(kill), flush=True)
            if len(done) < kills and saved_step(run) and not job.running and (run / "summary.json").exists():
                break  # the run was over before the kills were
            job.wait(lambda: False, 0.0 if job.running else 1.0)
            if job.running and len(done) < kills:
                raise SystemExit(f"the job neither made a step nor ended within {patience_s:g} s:\n" + "\n".join(job.last_lines()))
            if not job.running:
                left += job.left_behind()
            if job.running:
                break
        if not (run / "summary.json").exists():
            if not job.running:
                job = Job(network, count, arguments, logs, environment)
                stack.callback(job.end)
            if job.wait(lambda: (run / "summary.json").exists(), patience_s * 4):
                job.wait(lambda: False, patience_s)
            left += job.left_behind()
            if not (run / "summary.json").exists():
                raise SystemExit("the last start did not finish:\n" + "\n".join(log.read_text()[-2000:] for log in job.logs))
    config = load(arguments[0], list(arguments[1:]))
    expected, trained = expected_questions(config), trained_questions(run)
    return {
        "seed": seed,
        "hosts": count,
        "steps": config.run.steps,
        "steps_logged": [int(row["step"]) for row in read_metrics(run / "metrics.jsonl") if row["step"] > 0],
        "questions": sum(expected.values()),
        **difference(trained, expected),
        "left_behind": left,
        "seconds": round(time.monotonic() - began),
        "kills": [asdict(kill) for kill in done],
    }


def _one_kill(
    job: Job,
    network: hosts.Hosts | None,
    rng: random.Random,
    faults: Sequence[Fault],
    run: Path,
    count: int,
    number: int,
    patience_s: float,
) -> Kill | None:
    """Wait for a random point, do one thing, and see what becomes of the job; None where it ended by itself or never got that far."""
    before = saved_step(run)
    early = rng.random() < STARTUP_SHARE
    fault, host, delay_s = rng.choice(faults), rng.randrange(count), rng.uniform(0.0, 10.0)
    host = 0 if fault.on_head else host
    if not early and not job.wait(lambda: saved_step(run) > before, patience_s):
        return None
    until = time.monotonic() + delay_s
    job.wait(lambda: time.monotonic() > until, delay_s + 1)
    if fault.match:
        # A kind that is not running there yet is waited for; a kind that this host never has is looked for on the others.
        places = [host, *(other for other in range(count) if other != host)]
        if not job.wait(lambda: any(job.kill(fault, place) for place in places), patience_s):
            return None
    else:
        assert network is not None
        network.cut(host)
    began = time.monotonic()
    kill = Kill(number, fault.name, host, round(delay_s, 1), saved_step(run))
    step = saved_step(run)
    job.wait(lambda: saved_step(run) >= step + 2, patience_s)  # two more steps: it went on
    if job.running:
        kill.outcome = "went on" if saved_step(run) >= step + 2 else "hung"
    else:
        kill.outcome = "stopped"
    kill.ended_s = round(time.monotonic() - began, 1)
    kill.codes = [process.poll() for process in job.launchers]
    kill.sentences = job.last_lines()
    if not fault.match and network is not None:
        network.join(host)
    if kill.outcome == "hung":
        raise SystemExit(f"after {fault.name} on host {host} nothing happened within {patience_s:g} s:\n" + "\n".join(kill.sentences))
    return kill


def line(kill: Kill) -> str:
    """One row of the table, and below it what each host said."""
    head = f"{kill.number:>3}  {kill.fault:<15} host {kill.host}  after step {kill.step:<3} {kill.outcome:<8} {kill.ended_s:6.1f} s"
    return "\n".join([head, *(f"       host {number}: {text[:160]}" for number, text in enumerate(kill.sentences))])


def demo_arguments(folder: Path, steps: int) -> list[str]:
    """The demo at tiny size with data of its own below `folder`."""
    world = world_facts.build()
    prepare_data.write_corpus(world.passages, folder / "corpus.jsonl")
    prepare_data.write_questions((question for question in world.questions if question.split == "train"), folder / "train.parquet")
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
    parser.add_argument("--steps", type=int, help="default: three for each kill, so that the run outlasts them")
    parser.add_argument("--faults", nargs="*", choices=[fault.name for fault in FAULTS], help="only these; default: all")
    parser.add_argument("--patience-s", type=float, default=600, help="for a start, a step or an end")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    options = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if not options.faults or fault.name in options.faults]
    with tempfile.TemporaryDirectory(prefix="igpo-soak-run-") as folder:
        command = [*demo_arguments(Path(folder), options.steps or 3 * options.kills + 2), *options.overrides]
        result = soak(
            command,
            Path(folder) / "soak",
            kills=options.kills,
            seed=options.seed,
            count=options.hosts,
            patience_s=options.patience_s,
            faults=faults,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    good = not any(result[key] for key in VERDICTS) and len(result["kills"]) == options.kills
    found = ", ".join(f"{len(result[key])} {words}" for key, words in VERDICTS.items())
    print(f"{len(result['kills'])} kills, {result['questions']} questions: {found}; {options.out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
