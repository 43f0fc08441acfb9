"""summary.json and report.html of a quick start, from made-up results of its parts."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stepaudio_train.config.compose import save_config
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.evaluation.report import STAGES, QuickstartResults, write_quickstart_report
from stepaudio_train.evaluation.sound_report import speech_summary


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def errors(percent: float) -> dict:
    return {"percent": percent, "num_words": 40, "substitutions": 1, "deletions": 0, "insertions": 0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for stage in STAGES:
        losses = {"loss": 3.0, "loss/text": 2.0, "loss/semantic": 4.0, "loss/task/asr": 1.0, "grad_norm": 1.0}
        speed = {"learning_rate": 1e-3, "tokens_per_s": 5000.0, "elapsed_s": 1.0}
        write(tmp_path / stage / "metrics.jsonl", *({"step": n, "tokens": 100 * n} | losses | speed for n in (1, 2, 3)))
        save_config(PretrainConfig(), tmp_path / stage / "config.yaml")
    nats = {"text": 0.5, "linguistic": 1.5, "semantic": 2.5}
    likelihood = {"model": nats, "unigram": {k: v + 2 for k, v in nats.items()}, "num_tokens": dict.fromkeys(nats, 9)}
    asr = {"test": errors(2.5), "test_shuffled_audio": errors(97.5)}
    write(
        tmp_path / "evaluation" / "evaluation.json",
        {"asr": asr, "asr_by_language": {"en": errors(2.0), "zh": errors(3.0)}, "likelihood": likelihood},
    )
    line = {"set": "test", "id": "a", "reference": "go <left>", "hypothesis": "go"}
    write(tmp_path / "evaluation" / "transcripts.jsonl", line, line | {"id": "b", "hypothesis": "go <left>"})
    heard = {"prompt_heard": "go", "heard": "go stop", "prompt_s": 0.6, "continuation_s": 0.24}
    codes = {"linguistic": [1, 2, 3, 4], "semantic": [1, 2, 3, 4, 5, 6]}
    write(tmp_path / "evaluation" / "continuations.jsonl", {"id": "a", "reference": "go"} | heard | codes)
    kinds = ("reference", "resynthesis", "synthesis", "resynthesis_shuffled_tokens", "synthesis_shuffled_tokens")
    heard = {kind: {"wer": 20.0 + 5 * n, "num_words": 9} for n, kind in enumerate(kinds)}
    for kind, scores in heard.items():
        scores["utterances"] = [{"id": "a", "text": "go <left>", "heard": f"go {kind}"}]
        (tmp_path / "samples" / kind).mkdir(parents=True)
        soundfile.write(tmp_path / "samples" / kind / "a.wav", np.zeros(400), 8000)
    sounds = {kind: {"a": f"{kind}/a.wav"} for kind in kinds}
    speech = {"kinds": heard, "sounds": sounds, "tagged": [], "recogniser": "pocketsphinx"}
    write(tmp_path / "samples" / "speech.json", speech | {"summary": speech_summary(speech)})
    prepared = {"samples": {"train": 5}, "hours": {"train": 0.5}, "speakers": {"train": ["theo"]}, "refused": []}
    write(tmp_path / "prepared" / "report.json", prepared)
    return tmp_path


def test_summary_holds_what_is_promised(run):
    summary = QuickstartResults.read(run, {"prepare": 30.0, "stage3": 90.0}).summary()
    assert summary["minutes"] == 2.0
    assert summary["minutes_per_part"] == {"prepare": 0.5, "stage3": 1.5}
    assert summary["asr_wer"] == 2.5
    assert summary["asr_wer_shuffled_audio"] == 97.5
    assert summary["asr_wer_heldout_speaker"] is None
    assert summary["asr_wer_by_language"] == {"en": 2.0, "zh": 3.0}
    assert [summary[f"nll_{m}"] for m in ("text", "linguistic", "semantic")] == [0.5, 1.5, 2.5]
    assert [summary[f"unigram_nll_{m}"] for m in ("text", "linguistic", "semantic")] == [2.5, 3.5, 4.5]
    assert [summary[name] for name in ("reference_wer", "resynthesis_wer", "tts_wer")] == [20.0, 25.0, 30.0]
    assert summary["tts_wer_shuffled_tokens"] == 40.0
    assert summary["tokens"] == 900
    assert summary["tokens_per_stage"] == dict.fromkeys(STAGES, 300)
    assert summary["tokens_per_s"] == dict.fromkeys(STAGES, 5000)


def test_report_is_one_page_with_everything(run):
    page = write_quickstart_report(QuickstartResults.read(run, {"prepare": 30.0})).read_text(encoding="utf-8")
    titles = ("Speech recognition", "Held-out likelihood", "Three stages", "Continuations", "Sound", "Data", "What ran")
    for title in titles:
        assert title in page
    assert "go &lt;left&gt;" in page
    assert "<left>" not in page
    assert page.count("<svg") == 6
    assert not re.search(r'(src|href)="https?:', page)


def test_a_left_out_speaker_has_a_row_and_a_figure(run):
    file = run / "evaluation" / "evaluation.json"
    content = json.loads(file.read_text())
    content["asr"]["heldout_speaker"] = errors(12.5)
    file.write_text(json.dumps(content))
    results = QuickstartResults.read(run, {"prepare": 30.0})
    assert results.summary()["asr_wer_heldout_speaker"] == 12.5
    assert "12.5% for the speaker left out" in results.headline()
    assert "never heard in training" in write_quickstart_report(results).read_text(encoding="utf-8")


def test_fine_tuning_has_its_figures_beside_those_of_a_model_that_does_not_listen(run):
    plain = write_quickstart_report(QuickstartResults.read(run, {"prepare": 30.0})).read_text(encoding="utf-8")
    assert "Fine-tuning" not in plain and "aqta_exact" not in QuickstartResults.read(run, {}).summary()
    losses = {"loss": 2.0, "loss/task/aqta": 1.0, "val/loss/task/aqta": 1.5, "val/loss/task/tts": 1.5}
    write(run / "sft" / "metrics.jsonl", *({"step": n, "tokens": 100 * n} | losses for n in (1, 2, 3)))
    refused = [{"name": "train.jsonl:7", "reason": "(fats 2): no such tag"}]
    used = {"path": "train.jsonl", "conversations": 9, "tasks": {"aqta": 5, "tts": 4}, "tokens": 90}
    used |= {"tokens_with_loss": 20, "num_refused": 1, "refused": refused}
    write(run / "sft" / "data_report.json", {"data": used})
    scores = {"asr": {"num": 5, "wer": 6.25, "exact": 90.0}, "aqta": {"num": 5, "wer": 10.0, "exact": 87.5}}
    control = {task: {"num": 5, "wer": 97.0, "exact": 4.5} for task in scores}
    examples = {"aqta": [{"id": "q1", "reference": "<five>", "answer": "six"}]}
    answers = {"scores": scores, "scores_exchanged_audio": control, "examples": examples}
    write(run / "answers" / "answers.json", answers)
    speed = {"speed_control_spearman": 0.91, "speed_control_spearman_permuted_tags": -0.01}
    speed |= {"speed_control_spearman_permuted_tags_spread": 0.05, "num_speed_answers": 4}
    counts = {"num_answers": 4, "num_answers_from_tokens": 4, "num_refused": 0, "refused": []}
    write(run / "control" / "control.json", speed | counts)
    results = QuickstartResults.read(run, {"prepare": 30.0})
    summary = results.summary()
    assert (summary["sft_asr_wer"], summary["sft_asr_wer_shuffled_audio"]) == (6.25, 97.0)
    assert (summary["aqta_exact"], summary["aqta_exact_shuffled_audio"]) == (87.5, 4.5)
    assert (summary["speed_control_spearman"], summary["speed_control_spearman_permuted_tags"]) == (0.91, -0.01)
    assert summary["sft_refused"] == 1
    assert "spoken questions 88% right (4% with shuffled audio), speed as asked 0.91" in results.headline()
    page = write_quickstart_report(results).read_text(encoding="utf-8")
    for shown in ("Fine-tuning on conversations", "5 aqta, 4 tts", "(fats 2): no such tag", "&lt;five&gt;", "4.5"):
        assert shown in page
