"""The report of one run."""

import json
import re
from pathlib import Path

import pytest

from stepaudio_train.training.page import line_chart, table
from stepaudio_train.training.report import read_metrics, write_run_report


def write_run(folder: Path, num_steps: int) -> None:
    lines = []
    for step in range(1, num_steps + 1):
        line = {"step": step, "loss": 5 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_s": 100.0 + step}
        line |= {"loss/text": 3 / step, "loss/semantic": 6 / step, "loss/task/asr": 2 / step, "elapsed_s": step * 1.0}
        if step == num_steps:
            line |= {"val/loss/text": 2.125, "val/loss/task/asr": 1.5}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "config.yaml").write_text("run_dir: <here>\n", encoding="utf-8")


def test_report_holds_curves_figures_and_config_and_loads_nothing(tmp_path):
    write_run(tmp_path, 900)
    page = write_run_report(tmp_path).read_text(encoding="utf-8")
    for title in ("By modality", "By task", "Tokens per second", "Held-out losses"):
        assert title in page
    assert page.count("<svg") == 6
    assert "2.125" in page
    assert "&lt;here&gt;" in page
    assert not re.search(r'(src|href)="https?:', page)
    assert len(page) < 1_000_000


def test_a_line_cut_in_half_by_a_kill_is_left_out(tmp_path):
    write_run(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_run_without_metrics_says_so(tmp_path):
    assert "no step was logged" in write_run_report(tmp_path).read_text(encoding="utf-8")


def test_text_is_escaped_and_numbers_are_set_right():
    made = table(("word", "count"), [("<b>", 12345), ("x", None)])
    assert "<td>&lt;b&gt;</td>" in made
    assert '<td class="number">12,345</td>' in made


def test_the_same_numbers_give_the_same_chart():
    points = {"a": ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0])}
    assert line_chart("t", "x", "y", points) == line_chart("t", "x", "y", points)


def test_fine_tuning_tells_what_it_used_what_it_left_out_and_what_was_answered(tmp_path):
    write_run(tmp_path, 3)
    assert "Conversations" not in write_run_report(tmp_path).read_text(encoding="utf-8")
    refused = [{"name": "my.jsonl:7", "reason": "no such recording"}]
    used = {
        "path": "my.jsonl",
        "conversations": 9,
        "tasks": {"aqta": 5, "tts": 4},
        "tokens": 90,
        "tokens_with_loss": 20,
    }
    report = {"data": used | {"num_refused": 1, "refused": refused}}
    (tmp_path / "data_report.json").write_text(json.dumps(report), encoding="utf-8")
    (tmp_path / "samples").mkdir()
    for step, answer in ((2, "early"), (3, "<audio_1><audio_2>")):
        line = {"task": "tts", "prompt": "<s>say one", "reference": "<audio_1>" * 5, "answer": answer}
        (tmp_path / "samples" / f"step_{step:08d}.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    page = write_run_report(tmp_path).read_text(encoding="utf-8")
    for shown in ("my.jsonl:7", "no such recording", "5 aqta, 4 tts", "&lt;s&gt;say one", "[5 audio tokens]"):
        assert shown in page
    assert "[2 audio tokens]" in page and "early" not in page
