import json
import math

import pytest

from stepaudio_train.evaluation.codebook_report import LAYOUTS, StudyResults, write_study_report

NATS = {
    "interleaved": {"linguistic": 1.0, "semantic": 2.5},
    "linguistic": {"linguistic": 1.5},
    "semantic": {"semantic": 2.0},
    "sequential": {"linguistic": 1.4, "semantic": 1.2},
}


@pytest.fixture
def study(tmp_path):
    for layout in LAYOUTS:
        for seed in range(2):
            folder = tmp_path / f"{layout}_{seed}"
            (folder / "evaluation").mkdir(parents=True)
            lines = [{"step": s} | {f"val/loss/{k}": v + 1 / s for k, v in NATS[layout].items()} for s in (1, 10, 20)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            asr = {name: {"percent": 10.0 + seed} for name in ("test", "test_shuffled_audio")}
            model = {stream: nats + 0.1 * seed for stream, nats in NATS[layout].items()}
            content = {"asr": asr, "likelihood": {"model": model}}
            (folder / "evaluation" / "evaluation.json").write_text(json.dumps(content))
    return StudyResults.read(tmp_path, seeds=2)


def test_the_summary_says_what_was_found_and_no_more(study):
    summary = study.summary()
    found = summary["layouts"]["interleaved"]["perplexity_linguistic"]
    assert found["seeds"] == pytest.approx([math.e, math.exp(1.1)])
    assert found["mean"] == pytest.approx((math.e + math.exp(1.1)) / 2)
    assert "perplexity_semantic" not in summary["layouts"]["linguistic"]
    assert summary["interleaving_lowers_linguistic"] is True
    assert summary["interleaving_lowers_semantic"] is False
    assert summary["layouts"]["semantic"]["asr_wer"]["mean"] == 10.5
    assert "semantic perplexity: 7.78 alone, 12.82 interleaved: NOT lower" in study.verdict()


def test_the_report_has_curves_and_every_layout(study):
    report = write_study_report(study).read_text()
    assert report.count("<svg") == 2
    assert "both, interleaved 2:3" in report and "2.86 (2.72 to 3.00)" in report
    assert (study.run / "curves.png").read_bytes().startswith(b"\x89PNG")
