"""`stepaudio run`: finds recipes, starts ranks, passes on signals and exit statuses, leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepaudio_train.cli import build_parser, main
from stepaudio_train.commands import run

LAUNCH = (
    "import sys; from stepaudio_train.commands.run import run_ranks; "
    "sys.exit(run_ranks(sys.argv[2:], int(sys.argv[1])))"
)


def start(program: Path, num_processes: int) -> subprocess.Popen:
    command = [sys.executable, "-c", LAUNCH, str(num_processes), sys.executable, str(program)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(files: list[Path]) -> None:
    deadline = time.monotonic() + 20
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_ranks_see_the_world_and_threads_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = tmp_path / "program.py"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    program.write_text(
        "import os, pathlib\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text("
        f"' '.join(os.environ[n] for n in {names!r}))\n"
    )
    process = start(program, 2)
    process.communicate(timeout=30)
    assert process.returncode == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(tmp_path / str(r)).read_text() for r in (0, 1)] == [f"{r} {r} 2 {threads}" for r in (0, 1)]


def test_a_failed_rank_is_named_with_its_last_lines_and_ends_the_others(tmp_path: Path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time\n"
        "if os.environ['RANK'] == '1':\n    raise SystemExit(print('no such shard') or 7)\n"
        "time.sleep(600)"
    )
    begin = time.monotonic()
    process = start(program, 3)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 7
    assert "[rank 1] no such shard" in errors and "rank 1 left with exit status 7" in errors
    assert time.monotonic() - begin < run._GRACE_S + 5


def test_a_refused_configuration_is_told_once(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text("import os, sys\nif os.environ['RANK'] == '0': sys.stderr.write('bad key\\n')\nsys.exit(2)")
    process = start(program, 2)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (2, "bad key\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_every_rank_save_and_leave(tmp_path: Path, number: signal.Signals):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        f"folder, rank = pathlib.Path({str(tmp_path)!r}), os.environ['RANK']\n"
        "def save(*_):\n    (folder / f'saved{rank}').touch()\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(folder / f'ready{rank}').touch()\n"
        "time.sleep(600)"
    )
    process = start(program, 2)
    wait_for([tmp_path / "ready0", tmp_path / "ready1"])
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_ranks_end_with_a_killed_launcher(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, time\n"
        f"path = pathlib.Path({str(tmp_path)!r}, os.environ['RANK'])\n"
        "path.with_suffix('.tmp').write_text(str(os.getpid()))\npath.with_suffix('.tmp').rename(path)\ntime.sleep(600)"
    )
    process = start(program, 2)
    wait_for([tmp_path / "0", tmp_path / "1"])
    pids = [int((tmp_path / rank).read_text()) for rank in "01"]
    assert all(is_alive(pid) for pid in pids)
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        time.sleep(0.02)


def test_unknown_recipe_suggests_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["run", "pretran"]) == 2
    assert "did you mean pretrain?" in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_options(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(run, "run_recipe_command", lambda *arguments: seen.append(arguments) or 0)
    assert main(["run", "pretrain", "a=1", "--nproc", "4", "b=2"]) == 0
    assert seen == [("pretrain", ["a=1", "b=2"], 4)]


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as refused:
        main(["run", "pretrain", "--nprocs", "4"])
    assert refused.value.code == 2
    assert "--nprocs" in capsys.readouterr().err


def test_nproc_must_be_positive(capsys: pytest.CaptureFixture[str]):
    assert main(["run", "pretrain", "--nproc", "0"]) == 2
    assert "--nproc 0" in capsys.readouterr().err


def test_every_command_says_what_it_needs_and_gives_an_example():
    subcommands = next(a for a in build_parser()._actions if a.dest == "==SUPPRESS==" or a.metavar == "COMMAND")
    for name, parser in subcommands.choices.items():
        text = parser.format_help()
        assert "needs:" in text and f"stepaudio {name} " in text.split("example:")[1], name
