"""The quick start's own decisions, and the whole of it on a tiny corpus."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from stepaudio_train.commands.parts import Parts
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.quickstart import QuickstartConfig, quickstart_problems
from stepaudio_train.data.records import AudioPart, Record, speech_record
from stepaudio_train.data.token_shards import TokenStats

ROOT = Path(__file__).resolve().parents[2]
FSDD = ROOT.parent / "shared" / "data" / "fsdd"


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_recipe", ROOT / "recipes" / "quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recordings(folder: Path, duration_s: float, count: int = 3) -> list[Record]:
    records = []
    for index in range(count):
        path = folder / f"{duration_s}_{index}.wav"
        soundfile.write(path, np.zeros(int(8000 * duration_s)), 8000)
        records.append(speech_record(path.stem, AudioPart(str(path), text="go")))
    return records


@pytest.mark.parametrize(("duration_s", "joined"), [(0.4, 4), (0.9, 3), (1.3, 2), (2.5, 1), (12.0, 1)])
def test_short_recordings_are_joined_long_ones_are_not(quickstart, tmp_path, duration_s, joined):
    assert quickstart._join_max(QuickstartConfig(), recordings(tmp_path, duration_s)) == joined
    assert quickstart._join_max(QuickstartConfig(join_max=7), recordings(tmp_path, duration_s)) == 7


def test_broken_recordings_do_not_stop_the_measuring(quickstart, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    broken = speech_record("broken", AudioPart(str(tmp_path / "broken.wav"), text="go"))
    assert quickstart._join_max(QuickstartConfig(), [broken, *recordings(tmp_path, 1.3)]) == 2
    assert quickstart._join_max(QuickstartConfig(), [broken]) == 1


@pytest.mark.parametrize(
    ("lengths", "row"), [([200] * 9, 256), ([50] * 99 + [400], 256), ([120, 400], 512), ([5000] * 4, 2048)]
)
def test_rows_hold_all_but_the_odd_long_sample(quickstart, lengths, row):
    stats = TokenStats()
    for length in lengths:
        stats.tasks["asr"].add(length)
    assert quickstart._row_tokens(stats) == row


def test_a_changed_recording_changes_the_fingerprint(quickstart, tmp_path):
    records = recordings(tmp_path, 1.0)
    before = quickstart._fingerprint(records)
    assert quickstart._fingerprint(recordings(tmp_path, 1.0)[:2]) != before
    soundfile.write(records[0].audio_parts()[0].audio, np.zeros(100), 8000)
    assert quickstart._fingerprint(records) != before


@pytest.mark.parametrize(
    ("corpus", "tokens_per_s", "spent_s", "share"),
    [
        ("mine", 1e6, 60, 1.0),
        # 1.43 million tokens at stage 3, 3.69 million in the time of the speech decoder's steps; 1.8 times this speed.
        ("mine", 2000, 140, 0.47),
        ("mine", 300, 600, 0.25),
        # What is made here is fine-tuned on as well, 4.2 million tokens, and preferred, 1.4 million.
        (None, 4000, 140, 0.45),
        (None, 10000, 140, 1.0),
    ],
)
def test_a_slow_machine_trains_less_and_stays_with_it(quickstart, tmp_path, corpus, tokens_per_s, spent_s, share):
    metrics = tmp_path / "stage1" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text(json.dumps({"step": 1, "tokens_per_s": tokens_per_s}) + "\n")
    parts = Parts(tmp_path, 1)
    parts.seconds["so far"] = spent_s
    config = QuickstartConfig(minutes=20, stage3_steps=700, corpus=corpus)
    assert quickstart._share(config, tmp_path, parts) == share
    parts.seconds["and more"] = 300.0
    assert quickstart._share(config, tmp_path, parts) == share


def test_settings_that_make_no_sense_are_all_named():
    with pytest.raises(ConfigError) as told:
        load_config("quickstart", QuickstartConfig, ["minutes=0", "join_max=0", "stage1_steps=-1"], quickstart_problems)
    assert all(name in str(told.value) for name in ("minutes=0", "join_max=0", "stage1_steps=-1"))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["espeak", "recordings"])
def test_the_whole_of_it_on_a_tiny_corpus(tmp_path, source):
    """Minutes, and of no quality: that all parts fit together, that it is done once, and what it leaves."""
    run = tmp_path / "run"
    options = [f"run_dir={run}", "tokenizer_steps=30", "stage1_steps=4", "stage2_steps=4", "stage3_steps=12"]
    options += ["reward_steps=4", "ppo_steps=4", "flow_encoder_steps=4", "flow_steps=4", "vocoder_steps=4"]
    if source == "espeak":
        # Enough for a policy that speaks at all where it is asked to.
        options += ["corpus_minutes=2", "heldout_speaker=en-us+m1", "instruction_scale=0.03", "sft_epochs=15"]
    else:
        if not FSDD.is_dir():
            pytest.skip(f"{FSDD} is not there")
        corpus = tmp_path / "digits"
        corpus.mkdir()
        for path in sorted(FSDD.glob("*_[0-9].wav")):
            (corpus / path.name).symlink_to(path)
        options += [f"corpus={corpus}", "speed_copies=[]"]
    command = [sys.executable, "-m", "stepaudio_train.cli", "run", "quickstart", *options]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["minutes"] > 0
    for name in ("asr_wer", "nll_text", "nll_linguistic", "nll_semantic", "unigram_nll_text", "tokens"):
        assert summary[name] > 0
    assert (summary["asr_wer_heldout_speaker"] is None) == (source == "recordings")
    heard = ("reference_wer", "resynthesis_wer", "tts_wer", "tts_wer_shuffled_tokens")
    assert all(name in summary for name in heard)
    assert list((run / "samples" / "synthesis").glob("*.wav"))
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "Three stages" in report
    fine_tuned = ("sft_asr_wer", "aqta_exact", "aqta_exact_shuffled_audio", "speed_control_spearman")
    assert [name in summary for name in fine_tuned] == [source == "espeak"] * len(fine_tuned)
    rewarded = ("reward_accuracy", "ppo_score_before", "ppo_score_after", "ppo_gain_standard_error")
    assert [name in summary for name in rewarded] == [source == "espeak"] * len(rewarded)
    for title in ("Fine-tuning on conversations", "Learning from preferences"):
        assert (title in report) == (source == "espeak")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(summary["minutes_per_part"])
    other = subprocess.run([*command, "seed=5"], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 1
    assert "made with other settings" in other.stderr
