"""Recordings to shards: every way to give transcripts, refusals by name, splits, joins, copies, going on."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.plan import make_plan
from stepaudio_train.data.prepare import PrepareOptions, prepare
from stepaudio_train.data.records import AudioPart, Record, parse_record, speech_record
from stepaudio_train.data.shards import META_FOLDER, list_shards, read_shard, shard_counts
from stepaudio_train.data.sources import DIGITS, SourceError, find_recordings

FSDD = Path("../shared/data/fsdd")


def write_wav(path: Path, duration_s: float = 0.5, rate_hz: int = 8000, channels: int = 1, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (int(duration_s * rate_hz), channels))
    soundfile.write(path, noise, rate_hz, subtype="PCM_16")
    return path


def digits(folder: Path, speakers: tuple[str, ...] = ("ann", "bob"), takes: int = 6) -> Path:
    for digit in range(10):
        for speaker in speakers:
            for take in range(takes):
                write_wav(folder / f"{digit}_{speaker}_{take}.wav", 0.2 + 0.01 * digit, seed=digit)
    return folder


def stored(folder: Path) -> list[tuple[Record, np.ndarray]]:
    found = []
    for shard in list_shards(folder):
        for sample in read_shard(shard):
            record = parse_record(sample.members["json"], sample.key)
            (part,) = record.audio_parts()
            samples, rate_hz = soundfile.read(io.BytesIO(sample.members[part.audio]), dtype="float32")
            assert rate_hz == 16000 and samples.ndim == 1
            assert part.duration_s == pytest.approx(len(samples) / 16000)
            found.append((record, samples))
    return found


def texts(source: Path) -> dict[str, str | None]:
    return {r.id: r.audio_parts()[0].text for r in find_recordings(source).records}


def test_transcripts_of_a_folder_in_order_of_precedence(tmp_path):
    for name in ("a_x.wav", "b_x.wav", "c_x.wav", "sub/d_x.flac", "7_theo_3.wav"):
        write_wav(tmp_path / name)
    (tmp_path / "a_x.txt").write_text("from  the\nsidecar", encoding="utf-8")
    (tmp_path / "b_x.lab").write_text("from the lab", encoding="utf-8")
    (tmp_path / "transcripts.tsv").write_text('a_x.wav\tlisted\nc_x\t"quoted" words\n', encoding="utf-8")
    (tmp_path / "transcripts.jsonl").write_text(
        json.dumps({"audio": "sub/d_x.flac", "text": "listed too", "speaker": "eve"}), encoding="utf-8"
    )
    assert texts(tmp_path) == {
        "7_theo_3": "seven",
        "a_x": "from the sidecar",
        "b_x": "from the lab",
        "c_x": '"quoted" words',
        "sub/d_x": "listed too",
    }
    speakers = {r.id: r.audio_parts()[0].speaker for r in find_recordings(tmp_path).records}
    assert speakers["7_theo_3"] == "theo" and speakers["sub/d_x"] == "eve"


def test_ljspeech_metadata(tmp_path):
    write_wav(tmp_path / "wavs" / "LJ001-0001.wav")
    (tmp_path / "metadata.csv").write_text('LJ001-0001|Dr. "No"|Doctor "No"\n', encoding="utf-8")
    assert texts(tmp_path) == {"wavs/LJ001-0001": 'Doctor "No"'}


@pytest.mark.parametrize("name", ["12_x_1.wav", "noword.wav", "_x.wav", "3d_x.wav"])
def test_untranscribed_is_refused_unless_allowed(tmp_path, name):
    write_wav(tmp_path / "go_x.wav")
    write_wav(tmp_path / name)
    found = find_recordings(tmp_path)
    assert [r.name for r in found.refusals] == [name] and "no transcript" in found.refusals[0].reason
    assert len(find_recordings(tmp_path, allow_untranscribed=True).records) == 2


@pytest.mark.parametrize("ending", ["jsonl", "tsv", "csv"])
def test_manifests(tmp_path, ending):
    write_wav(tmp_path / "audio" / "a.wav")
    rows = [{"audio": "audio/a.wav", "text": "one, two", "speaker": "ann", "take": "3"}, {"audio": "b.wav", "text": ""}]
    manifest = tmp_path / f"list.{ending}"
    if ending == "jsonl":
        manifest.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        mark = "\t" if ending == "tsv" else ","
        text = "one, two" if ending == "tsv" else '"one, two"'
        lines = [["audio", "text", "speaker", "take"], ["audio/a.wav", text, "ann", "3"], ["b.wav", "", "", ""]]
        manifest.write_text("\n".join(mark.join(line) for line in lines), encoding="utf-8")
    found = find_recordings(manifest)
    (record,) = found.records
    assert record.id == "audio/a" and record.meta == {"take": "3"}
    part = record.audio_parts()[0]
    assert (part.text, part.speaker) == ("one, two", "ann") and Path(part.audio).is_absolute()
    assert "no transcript" in found.refusals[0].reason


def test_a_manifest_of_records_keeps_spans_and_meta(tmp_path):
    write_wav(tmp_path / "a.wav", 1.0)
    span = {"start_s": 0.0, "end_s": 0.5, "text": "one"}
    spans = [span, {"start_s": 0.5, "end_s": 1.0, "text": "two"}]
    content = {"type": "audio", "audio": "a.wav", "text": "one two", "spans": spans}
    good = {"id": "r1", "messages": [{"role": "human", "content": [content]}], "meta": {"from": "test"}}
    bad = {"id": "r2", "messages": [{"role": "nobody", "content": [content]}]}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n{json.dumps(good)}\n", encoding="utf-8")
    found = find_recordings(manifest)
    assert [r.id for r in found.records] == ["r1"] and len(found.records[0].audio_parts()[0].spans) == 2
    reasons = [(r.name, r.reason) for r in found.refusals]
    assert reasons[0][0] == f"{manifest}:2" and "messages.0.role" in reasons[0][1]
    assert "'r1' is taken" in reasons[1][1]


def test_unusable_sources_say_why(tmp_path):
    with pytest.raises(SourceError, match="no such file"):
        find_recordings(tmp_path / "absent")
    with pytest.raises(SourceError, match="holds no audio"):
        find_recordings(tmp_path)
    (tmp_path / "m.csv").write_text("a.wav,one\n", encoding="utf-8")
    with pytest.raises(SourceError, match="must name the columns"):
        find_recordings(tmp_path / "m.csv")
    (tmp_path / "m.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"m\.jsonl:1: no JSON"):
        find_recordings(tmp_path / "m.jsonl")


def test_prepare_end_to_end(tmp_path):
    source = digits(tmp_path / "in")
    write_wav(source / "1_stereo_0.wav", 0.5, 44100, channels=2)
    write_wav(source / "2_short_0.wav", 0.05)
    write_wav(source / "3_long_0.wav", 3.0)
    write_wav(source / "nothing.wav")
    soundfile.write(source / "4_silent_0.wav", np.zeros(8000), 8000)
    (source / "5_broken_0.wav").write_bytes(b"no audio at all")
    cut = write_wav(source / "6_cut_0.wav", 1.0)
    cut.write_bytes(cut.read_bytes()[:5000])
    (source / "7_empty_0.mp3").touch()
    options = PrepareOptions(source, tmp_path / "out", max_duration_s=2.0, heldout_speaker="bob")
    report = prepare(options)

    reasons = {r.name: r.reason for r in report.refused}
    for name, word in {
        "2_short_0": "too short: 0.050 s",
        "3_long_0": "too long: 3.0 s",
        "nothing.wav": "no transcript",
        "4_silent_0": "silent",
        "5_broken_0": "cannot be read",
        "6_cut_0": "cut off",
        "7_empty_0": "",
    }.items():
        assert word in reasons.pop(name), name
    assert not reasons
    assert report.samples["heldout_speaker"] == 60
    assert sum(report.samples.values()) == 121
    assert {"train", "validation", "test"} < set(report.samples)
    everything = {split: stored(options.output / split) for split in report.samples}
    assert {split: len(samples) for split, samples in everything.items()} == report.samples
    ids = [record.id for samples in everything.values() for record, _ in samples]
    assert len(set(ids)) == 121 and "1_stereo_0" in ids
    for split, samples in everything.items():
        assert sum(shard_counts(options.output / split).values()) == len(samples)
        assert (options.output / split / META_FOLDER / "split.yaml").is_file()
        for record, _ in samples:
            part = record.audio_parts()[0]
            assert (part.speaker == "bob") == (split == "heldout_speaker")
    assert report.hours["heldout_speaker"] == pytest.approx(60 * 0.245 / 3600, rel=1e-3)
    written = json.loads((options.output / "report.json").read_text())
    assert written["samples"] == report.samples and len(written["refused"]) == 7
    assert "too short" in (options.output / "report.txt").read_text()


def test_called_again_it_returns_the_report_and_goes_on_after_a_stop(tmp_path):
    options = PrepareOptions(digits(tmp_path / "in"), tmp_path / "out")
    report = prepare(options)
    shard = options.output / "train" / "shard-000000.tar"
    before, content = shard.stat().st_mtime_ns, shard.read_bytes()
    assert prepare(options) == report and shard.stat().st_mtime_ns == before

    # As if it had been killed while it wrote the test split.
    (options.output / "report.json").unlink()
    for path in (options.output / "test").glob("shard*"):
        path.unlink()
    assert prepare(options) == report
    assert shard.stat().st_mtime_ns == before
    assert len(stored(options.output / "test")) == report.samples["test"]

    (options.output / "report.json").unlink()
    (options.output / "train" / "shard-000000.result.json").unlink()
    assert prepare(options) == report
    assert shard.read_bytes() == content, "the same recordings give the same shard"


def test_other_work_in_the_output_is_not_touched(tmp_path):
    source = digits(tmp_path / "in", ("ann",), 2)
    options = PrepareOptions(source, tmp_path / "out")
    prepare(options)
    with pytest.raises(UserError, match="with other options"):
        prepare(PrepareOptions(source, tmp_path / "out", join_max=2))
    write_wav(source / "9_ann_9.wav")
    with pytest.raises(UserError, match="other recordings"):
        prepare(options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        prepare(PrepareOptions(source, tmp_path / "mine"))


def test_processes_write_the_same(tmp_path):
    source = digits(tmp_path / "in", ("ann", "bob"), 15)
    alone = prepare(PrepareOptions(source, tmp_path / "one", num_workers=1))
    together = prepare(PrepareOptions(source, tmp_path / "two", num_workers=2))
    assert alone == together
    for shard in (tmp_path / "one").rglob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "two" / shard.relative_to(tmp_path / "one")).read_bytes()


def test_joined_recordings_have_spans_that_cover_them(tmp_path):
    source = digits(tmp_path / "in")
    plain = prepare(PrepareOptions(source, tmp_path / "plain"))
    options = PrepareOptions(source, tmp_path / "out", join_max=3, speed_copies=(0.8,))
    report = prepare(options)
    assert {s: report.samples[s] for s in ("validation", "test")} == {
        s: plain.samples[s] for s in ("validation", "test")
    }
    single, joined, slow = [], [], []
    lengths = {}
    for record, samples in stored(options.output / "train"):
        lengths[record.id] = len(samples)
        part = record.audio_parts()[0]
        (slow if "speed" in record.meta else joined if part.spans else single).append(record)
        if part.spans:
            words = [span.text for span in part.spans]
            assert 2 <= len(words) <= 3 and part.text == " ".join(words)
            assert part.spans[0].start_s == 0 and part.spans[-1].end_s == pytest.approx(part.duration_s)
            for a, b in zip(part.spans, part.spans[1:], strict=False):
                assert a.end_s == b.start_s
            assert len(record.meta["pieces"]) == len(words)
    assert len(single) == plain.samples["train"]
    assert len(slow) == len(single) + len(joined)
    # Each recording is in one pair and in one group of three, but for what is left over of each speaker.
    assert len(single) // 2 - 2 <= sum(len(r.audio_parts()[0].spans) == 2 for r in joined) <= len(single) // 2
    for record in slow:
        assert lengths[record.id] == pytest.approx(lengths[record.meta["original"]] / 0.8, abs=2)
    held_out = {r.id for split in ("validation", "test") for r, _ in stored(options.output / split)}
    assert not held_out & {piece for r in joined for piece in r.meta["pieces"]}


def test_splits_depend_on_the_id_alone():
    records = [speech_record(f"r{i}", AudioPart("x")) for i in range(3000)]
    options = PrepareOptions(Path("x"), Path("y"), test_percent=20, validation_percent=5)
    plan = make_plan(records, options)
    assert len(plan["test"]) == pytest.approx(600, abs=70) and len(plan["validation"]) == pytest.approx(150, abs=40)
    fewer = make_plan(records[:1000][::-1], options)
    for split in ("train", "validation", "test"):
        assert {i.id for i in fewer[split]} == {i.id for i in plan[split]} & {r.id for r in records[:1000]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"test_percent": 60, "validation_percent": 40}, "leave no training data"),
        ({"min_duration_s": 5.0, "max_duration_s": 1.0}, "make no range"),
        ({"join_max": 0}, "join_max"),
        ({"speed_copies": (1.0, 5.0)}, "speeds must be"),
        ({"heldout_speaker": "nobody"}, "known speakers: ann"),
    ],
)
def test_options_that_make_no_sense(tmp_path, changes, expected):
    source = digits(tmp_path / "in", ("ann",), 1)
    with pytest.raises(UserError, match=expected):
        prepare(PrepareOptions(source, tmp_path / "out", **changes))


def test_a_full_disk_leaves_whole_shards_alone(tmp_path, monkeypatch):
    options = PrepareOptions(digits(tmp_path / "in"), tmp_path / "out")
    import stepaudio_train.data.shards as shards

    written = []

    def full(self, member, file=None):
        written.append(member)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        return original(self, member, file)

    original = shards.tarfile.TarFile.addfile
    monkeypatch.setattr(shards.tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(options)
    assert not list(options.output.rglob("*.tar")) and not list(options.output.rglob("*.partial"))
    monkeypatch.undo()
    assert sum(prepare(options).samples.values()) == 120


@pytest.mark.skipif(not FSDD.is_dir(), reason="needs ../shared/data/fsdd, real recordings of digits")
def test_real_digits(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in sorted(FSDD.glob("*_1*.wav")):
        os.symlink(path.resolve(), folder / path.name)
    report = prepare(PrepareOptions(folder, tmp_path / "out", heldout_speaker="lucas"))
    assert not report.refused and report.speakers["heldout_speaker"] == ["lucas"]
    assert {r.audio_parts()[0].text for r, _ in stored(tmp_path / "out" / "train")} == set(DIGITS)
