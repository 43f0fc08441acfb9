"""`stepaudio doctor` finds what is wrong and says what to type."""

from pathlib import Path

import pytest

from stepaudio_train.cli import main
from stepaudio_train.commands import doctor
from stepaudio_train.commands.doctor import Finding


def test_this_machine_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--run-dir", str(tmp_path / "not" / "yet")]) == 0
    output = capsys.readouterr().out
    assert "Ready." in output and "two talk over gloo" in output
    assert not (tmp_path / "not").exists()


def test_a_broken_thing_gives_status_1_and_advice(monkeypatch, tmp_path: Path, capsys):
    finding = Finding("audio files", "broken", "no libsndfile", "make clean setup")
    monkeypatch.setattr(doctor, "checks", lambda run_dir: [lambda: finding])
    assert main(["doctor", "--run-dir", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "make clean setup" in output and "1 thing(s) to mend" in output


def test_missing_and_old_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    wanted = ["numpy>=999", "no-such-package", "other; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    finding = doctor.check_packages()
    assert finding.state == "broken" and "make setup" in finding.advice
    assert "no-such-package is missing" in finding.fact and "is not >=999" in finding.fact
    assert "other" not in finding.fact


def test_a_folder_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    finding = doctor.check_disk(tmp_path)
    assert finding.state == "broken" and "Permission denied" in finding.fact and "--run-dir" in finding.advice


def test_silent_network_interfaces_are_broken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_GLOO_PROBE", "raise SystemExit(3)")
    finding = doctor.check_gloo()
    assert finding.state == "broken" and "status 3" in finding.fact and "GLOO_SOCKET_IFNAME" in finding.advice


@pytest.mark.parametrize(("version", "state"), [("2.13.0+cu130", "ok"), ("2.9.1", "note")])
def test_untested_torch_is_noted(monkeypatch: pytest.MonkeyPatch, version: str, state: str):
    class Torch:
        __version__ = version

    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: Torch)
    assert doctor.check_torch().state == state
