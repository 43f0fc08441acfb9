"""Parts of a job: run once, resumed, refused under other settings, stopped by signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepaudio_train.commands.parts import PartFailed, Parts, exclusive
from stepaudio_train.config.errors import UserError


def append(path: Path, word: str) -> list[str]:
    return [sys.executable, "-c", f"open({str(path)!r}, 'a').write({word!r}); print('said', {word!r})"]


def test_parts_run_once_and_their_output_is_kept(tmp_path, capsys):
    for _ in range(2):
        parts = Parts(tmp_path, total=2)
        parts.run("first", append(tmp_path / "trace", "a"))
        parts.run("second", append(tmp_path / "trace", "b"))
        assert list(parts.seconds) == ["first", "second"]
        assert all(seconds > 0 for seconds in parts.seconds.values())
    assert (tmp_path / "trace").read_text() == "ab"
    assert (tmp_path / "logs" / "second.log").read_text() == "said b\n"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "[ 1/2] first" in lines[0]
    assert "done before" in lines[2]


def test_a_failed_part_is_shown_and_tried_again(tmp_path):
    flag = tmp_path / "flag"
    program = f"import sys, os; print('no flag there'); sys.exit(0 if os.path.exists({str(flag)!r}) else 3)"
    with pytest.raises(PartFailed, match=r"exit status 3(.|\n)*no flag there"):
        Parts(tmp_path, 1).run("picky", [sys.executable, "-c", program])
    flag.touch()
    Parts(tmp_path, 1).run("picky", [sys.executable, "-c", program])


def test_other_settings_are_refused_and_named(tmp_path):
    Parts(tmp_path, 2).run("first", append(tmp_path / "trace", "a"), {"recordings": "12, abc"})
    with pytest.raises(UserError, match="recordings 12, abc before, 13, abd now"):
        Parts(tmp_path, 2).run("first", append(tmp_path / "trace", "a"), {"recordings": "13, abd"})
    with pytest.raises(UserError, match="part first was made with other settings"):
        Parts(tmp_path, 2).run("first", append(tmp_path / "trace", "c"), {"recordings": "12, abc"})
    assert (tmp_path / "trace").read_text() == "a"


def test_a_part_depends_on_those_before_it(tmp_path):
    parts = Parts(tmp_path, 2)
    parts.run("first", append(tmp_path / "trace", "a"))
    parts.run("second", append(tmp_path / "trace", "b"))
    (tmp_path / "parts" / "first.json").unlink()
    changed = Parts(tmp_path, 2)
    changed.run("first", append(tmp_path / "trace", "c"))
    with pytest.raises(UserError, match="an earlier part differs"):
        changed.run("second", append(tmp_path / "trace", "b"))


def test_a_directory_is_held_by_one_process(tmp_path):
    with exclusive(tmp_path), pytest.raises(UserError, match="another process"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="signals between process groups are tested on Linux")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_part_once_and_the_job_goes_on_later(tmp_path, number):
    trace = tmp_path / "trace"
    part = (
        f"import signal, time; t = open({str(trace)!r}, 'a', buffering=1);"
        "[signal.signal(n, lambda n, f: t.write('caught\\n')) for n in (2, 15)]; t.write('started\\n'); time.sleep(1)"
    )
    job = (
        "import sys; from pathlib import Path; from stepaudio_train.commands.parts import Parts;"
        f"Parts(Path({str(tmp_path)!r}), 1).run('slow', [sys.executable, '-c', {part!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", job], stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(trace)
    time.sleep(0.2)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "goes on from here" in output
    assert trace.read_text().count("caught") == 1
    assert not (tmp_path / "parts" / "slow.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is only told on Linux")
def test_a_killed_job_leaves_no_part_behind(tmp_path):
    pid_file = tmp_path / "pid"
    part = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    job = (
        "import sys; from pathlib import Path; from stepaudio_train.commands.parts import Parts;"
        f"Parts(Path({str(tmp_path)!r}), 1).run('slow', [sys.executable, '-c', {part!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", job], stdout=subprocess.DEVNULL)
    wait_for(pid_file)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(int(pid_file.read_text())):
        time.sleep(0.05)
    assert not is_running(int(pid_file.read_text()))


def test_markers_hold_the_command(tmp_path):
    command = append(tmp_path / "trace", "a")
    Parts(tmp_path, 1).run("first", command)
    assert json.loads((tmp_path / "parts" / "first.json").read_text())["settings"]["command"] == command


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.is_file() and path.read_text()):
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
