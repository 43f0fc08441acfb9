"""The launch scripts: their commands, and SLURM's checkpoint-and-requeue with stand-ins for its programs."""

import os
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TORCHRUN = ROOT / "launch" / "torchrun.sh"
SBATCH = ROOT / "launch" / "slurm" / "pretrain.sbatch"

# Two tasks in the background, as srun would start them on two nodes of one GPU each; their status is the step's.
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
export SLURM_LOCALID=0
SLURM_PROCID=0 "$@" & a=$!
SLURM_PROCID=1 "$@" & b=$!
echo "$a $b" > "$FAKE/tasks.tmp"; mv "$FAKE/tasks.tmp" "$FAKE/tasks"
wait $a; s=$?; wait $b; t=$?; exit $((s > t ? s : t))
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> "$FAKE/scontrol"; fi
"""
SCANCEL = """#!/usr/bin/env bash
echo "$@" >> "$FAKE/scancel"; kill -TERM $(cat "$FAKE/tasks")
"""
RANK_PROGRAM = """
import os, pathlib, signal, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
seen = " ".join([os.environ[n] for n in names] + sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
pathlib.Path(os.environ["FAKE"], "rank" + os.environ["RANK"]).write_text(seen)
if os.environ["BEHAVIOUR"] == "wait":
    time.sleep(600)
sys.exit(5 if os.environ["BEHAVIOUR"] == "fail" and os.environ["RANK"] == "1" else 0)
"""


def dry_run(script: Path, *arguments: str, **variables: str) -> list[str]:
    env = {**os.environ, "PYTHON": sys.executable, "DRY_RUN": "1", **variables}
    result = subprocess.run([script, *arguments], env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    return shlex.split(result.stdout)


@pytest.mark.parametrize("script", [TORCHRUN, SBATCH], ids=lambda path: path.name)
def test_scripts_parse(script: Path):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert os.access(script, os.X_OK)


def test_torchrun_on_one_node():
    command = dry_run(TORCHRUN, "pretrain", "experiment=debug", "a=[1, 2]", NPROC_PER_NODE="3")
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--standalone" in command and command[command.index("--nproc-per-node") + 1] == "3"
    assert command[-3:] == [str(ROOT / "recipes/pretrain.py"), "experiment=debug", "a=[1, 2]"]


def test_torchrun_on_many_nodes():
    command = dry_run(TORCHRUN, "pretrain", NPROC_PER_NODE="8", NNODES="4", MASTER_ADDR="node0", MAX_RESTARTS="2")
    pairs = dict(pairwise(command))
    assert pairs["--nnodes"] == "4" and pairs["--max-restarts"] == "2"
    assert pairs["--rdzv-endpoint"] == "node0:29500" and pairs["--rdzv-backend"] == "c10d"
    assert "--standalone" not in command


def test_make_quickstart_takes_a_corpus_and_a_name():
    variables = {"CORPUS": "my recordings", "RUN": "mine"}
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "quickstart", *(f"{key}={value}" for key, value in variables.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(shown.stdout.splitlines()[-1])
    assert words[1:] == ["run", "quickstart", "corpus=my recordings", "run_dir=runs/mine"]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "which recipe?"),
        (["nosuch"], {}, "no recipe 'nosuch'; recipes:"),
        (["pretrain"], {"NNODES": "2", "NPROC_PER_NODE": "1"}, "needs MASTER_ADDR"),
    ],
)
def test_torchrun_refuses_with_what_to_type(arguments: list[str], variables: dict[str, str], message: str):
    env = {**os.environ, "PYTHON": sys.executable, **variables}
    result = subprocess.run([TORCHRUN, *arguments], env=env, capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a SLURM job of two tasks whose submit folder holds a stand-in recipe."""
    fake = tmp_path / "bin"
    fake.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "pretrain.py").write_text(RANK_PROGRAM)
    return {
        **os.environ,
        "PATH": f"{fake}:{os.environ['PATH']}",
        "FAKE": str(tmp_path),
        "BEHAVIOUR": "finish",
        "PYTHON": sys.executable,
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "6",
        "SLURM_JOB_NAME": "demo",
        "OMP_NUM_THREADS": "",
    }


def submit(env: dict[str, str], *overrides: str) -> subprocess.Popen:
    command = [str(SBATCH), "engine=megatron", *overrides]
    return subprocess.Popen(
        command, env=env, cwd=env["FAKE"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_slurm_starts_every_rank_and_keeps_the_configuration(cluster: dict[str, str]):
    process = submit(cluster, "training.max_steps=7")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    folder = Path(cluster["FAKE"])
    for rank in "01":
        expected = f"{rank} 0 2 node7 20077 6 engine=megatron training.max_steps=7"
        assert (folder / f"rank{rank}").read_text() == expected
    assert "max_steps: 7" in (folder / "demo-77.config.yaml").read_text()
    assert not (folder / "scontrol").exists()


def test_slurm_passes_on_a_failure(cluster: dict[str, str]):
    process = submit({**cluster, "BEHAVIOUR": "fail"})
    process.communicate(timeout=60)
    assert process.returncode == 5
    assert not (Path(cluster["FAKE"]) / "scontrol").exists()


def test_slurm_refuses_a_wrong_configuration_before_any_rank(cluster: dict[str, str]):
    process = submit(cluster, "training.max_stepz=7")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "training.max_steps" in output and not (Path(cluster["FAKE"]) / "rank0").exists()


def test_slurm_saves_and_requeues_before_the_time_is_up(cluster: dict[str, str]):
    process = submit({**cluster, "BEHAVIOUR": "wait"})
    folder = Path(cluster["FAKE"])
    deadline = time.monotonic() + 60
    while not all((folder / name).exists() for name in ("rank0", "rank1", "tasks")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (folder / "scancel").read_text() == "--signal=TERM 77\n"
    assert (folder / "scontrol").read_text() == "requeue 77\n"
