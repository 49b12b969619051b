"""One study, one worker and two: how long each takes, and what kill -9 of one in the middle costs. On a real PostgreSQL.

    python benchmarks/study_workers.py [--trials 240] [--samples 16] [--network unet] [--cfg 1] [--url postgresql://...]

Needs ``COMFYUI_PATH`` and, without --url, PostgreSQL's programs: it makes a database cluster in a temporary folder, started as
the user postgres if this is run by root. The workflow is a Search Solver on the demo network. Each worker is a ComfyUI of its
own, with one thread. A node in a third ComfyUI would lead; here the first worker creates the study, which is all the same.

On two cores one worker leaves one of them idle, so this measures what a second machine, or a second GPU, brings, and not a second
worker on the same one. A worker that is started first and thrown away has the files of all others in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT.parent))


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URL of a fresh database, until the end of the block."""
    programs = sorted(glob.glob("/usr/lib/postgresql/*/bin")) or [os.path.dirname(shutil.which("initdb") or "")]
    data, user = folder / "postgres", pwd.getpwuid(os.getuid()).pw_name
    data.mkdir()
    owner = {}
    if user == "root":
        user, known = "postgres", pwd.getpwnam("postgres")
        os.chown(data, known.pw_uid, known.pw_gid)
        folder.chmod(0o755)
        owner = {"user": known.pw_uid, "group": known.pw_gid, "extra_groups": []}

    def program(name: str, *arguments: str) -> None:
        command = [os.path.join(programs[-1], name), "-D", str(data), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=data, **owner)

    program("initdb", "-A", "trust", "-U", user)
    program("pg_ctl", "-w", "-l", str(data / "log"), "-o", f"-k {data} -h ''", "start")
    try:
        yield f"postgresql://{user}@/postgres?host={data}"
    finally:
        program("pg_ctl", "-w", "-m", "fast", "stop")


def workflow(asked) -> dict:
    """As the API takes it."""
    nodes = {
        "model": ("Quickstep_DemoModel", {"network": asked.network}),
        "positive": ("CLIPTextEncode", {"text": "a big red circle on the left", "clip": ["model", 1]}),
        "negative": ("CLIPTextEncode", {"text": "", "clip": ["model", 1]}),
        "latent": ("EmptyLatentImage", {"width": 32, "height": 32, "batch_size": 4}),
    }
    search = {
        "model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent": ["latent", 0], "cfg": asked.cfg,
        "steps": 8, "samples": asked.samples, "minutes": 120.0, "seed": 0, "name": "bench", "loss": "rms", "search": "tpe",
        "trials": asked.trials, "fewest": 3, "order": 3, "derivatives": True, "predictions": True, "correctors": True,
        "times": True, "study": "", "storage": "", "role": "lead",
    }  # fmt: skip
    nodes["search"] = ("Quickstep_SearchSolver", search)
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


class Bench:
    """Workers on studies of one database."""

    def __init__(self, folder: Path, url: str, asked):
        self.folder, self.url = folder, url
        self.file = folder / "workflow.json"
        self.file.write_text(json.dumps(workflow(asked)))
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.optuna, self.studies = optuna, {}
        self.storage = optuna.storages.RDBStorage(url.replace("postgresql://", "postgresql+psycopg://", 1))

    def worker(self, study: str, number: int) -> subprocess.Popen:
        base = self.folder / f"{study}-{number}"
        (base / "custom_nodes").mkdir(parents=True)
        (base / "custom_nodes" / "quickstep").symlink_to(ROOT, target_is_directory=True)
        (self.folder / f"user-{study}").mkdir(exist_ok=True)
        command = [sys.executable, "-m", "custom_nodes.quickstep.nodes.worker", "--storage", self.url, "--study", study]
        command += ["--workflow", str(self.file), "--comfyui", os.environ["COMFYUI_PATH"], "--"]
        command += ["--cpu", "--base-directory", str(base), "--disable-api-nodes"]
        command += ["--user-directory", str(self.folder / f"user-{study}")]  # as on one machine: they share the teacher
        with open(base / "log", "w") as log:
            alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(base)}
            return subprocess.Popen(command, cwd=base, stdout=log, stderr=log, env=alone)

    def trials(self, study: str) -> list:
        """Empty before there is such a study. It is opened once, so that only what is new is read, and no worker waits for that."""
        if study not in self.studies:
            with contextlib.suppress(KeyError):
                self.studies[study] = self.optuna.load_study(study_name=study, storage=self.storage)
        return self.studies[study].get_trials(deepcopy=False) if study in self.studies else []

    def finished(self, study: str) -> int:
        return sum(trial.state.is_finished() and trial.state.name != "FAIL" for trial in self.trials(study))

    def warm(self) -> None:
        """A worker, until ComfyUI has started and it has made a study."""
        worker = self.worker("warm", 0)
        try:
            while "warm" not in self.studies and not self.trials("warm"):
                if worker.poll() is not None:
                    raise SystemExit(self.failed("warm", 0))
                time.sleep(1.0)
        finally:
            worker.kill()
            worker.wait()

    def run(self, study: str, workers: int, kill_after: int = 0) -> float:
        """Seconds until all have ended. kill_after: so many trials, then -9 for the last worker."""
        began, running = time.monotonic(), [self.worker(study, i) for i in range(workers)]
        try:
            if kill_after:
                while self.finished(study) < kill_after and all(w.poll() is None for w in running):
                    time.sleep(1.0)
                running[-1].send_signal(signal.SIGKILL)
            codes = [w.wait() for w in running]
        finally:
            for w in running:
                w.kill()
        for i, code in enumerate(codes[: -1 if kill_after else None]):
            if code:
                raise SystemExit(self.failed(study, i))
        if kill_after and codes[-1] != -signal.SIGKILL:
            raise SystemExit(self.failed(study, workers - 1))
        return time.monotonic() - began

    def failed(self, study: str, number: int) -> str:
        log = (self.folder / f"{study}-{number}" / "log").read_text()[-2000:]
        return f"worker {number} of the study {study} failed, or ended too early; the end of its log:\n{log}"

    def check(self, study: str, wanted: int) -> None:
        """That nothing was lost when one of two was killed: what it ran was tried again, and the other ran all the rest."""
        states = [trial.state.name for trial in self.trials(study)]
        again = [trial for trial in self.trials(study) if "failed_trial" in trial.system_attrs]
        assert "RUNNING" not in states, "a trial is said to run still"
        assert self.finished(study) == wanted, f"{self.finished(study)} trials finished, and not {wanted}"
        assert states.count("FAIL") == len(again) <= 1, (
            f"{states.count('FAIL')} trials failed, {len(again)} were tried again"
        )

    def samples(self, study: str) -> int:
        """Runs of a sample of the fit, those of a trial that was killed included."""
        begun = [trial for trial in self.trials(study) if trial.state.name != "WAITING"]
        return sum(max(len(t.user_attrs.get("errors", ())), len(t.intermediate_values)) for t in begun)

    def twice(self, study: str) -> int:
        """Starts that were in the queue once too often; not those of a trial that was tried again."""
        labels = [t.user_attrs.get("start") for t in self.trials(study) if "failed_trial" not in t.system_attrs]
        starts = [label for label in labels if label is not None]
        return len(starts) - len(set(starts))

    def spans(self, study: str) -> float:
        """Seconds from the first trial's start to the last one's end: without the start of ComfyUI and the teacher."""
        done = [trial for trial in self.trials(study) if trial.datetime_complete and trial.datetime_start]
        return (max(t.datetime_complete for t in done) - min(t.datetime_start for t in done)).total_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=240)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--network", default="unet")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--url")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="quickstep-workers-"))
    try:
        with postgres(folder) if asked.url is None else contextlib.nullcontext(asked.url) as url:
            bench = Bench(folder, url, asked)
            bench.warm()
            rows = {"one": (1, 0), "two": (2, 0), "killed": (2, asked.trials // 3)}
            whole, trials = {}, {}
            for study, (workers, kill_after) in rows.items():
                whole[study] = bench.run(study, workers, kill_after)
                trials[study] = bench.spans(study)
                states = [trial.state.name for trial in bench.trials(study)]
                counts = {name: states.count(name) for name in sorted(set(states))}
                said = f"{workers} worker(s)" + (
                    f", one killed with -9 after {kill_after} trials" if kill_after else ""
                )
                print(
                    f"{said}: {whole[study]:.0f} s, its trials {trials[study]:.0f} s; {counts}; {bench.samples(study)} samples "
                    f"run, {bench.twice(study)} starts twice",
                    flush=True,
                )
                if kill_after:
                    bench.check(study, asked.trials)
            print(
                f"two / one: {whole['two'] / whole['one']:.2f} of all, {trials['two'] / trials['one']:.2f} of the trials' time"
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
