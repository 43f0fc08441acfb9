import json
import math
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.tags import TagVocabulary
from stepaudio_train.evaluation.contours import Contour
from stepaudio_train.evaluation.control import ControlOptions, measure_control
from stepaudio_train.evaluation.control_measures import compare, correlation, spearman
from stepaudio_train.evaluation.control_report import control_section
from stepaudio_train.evaluation.spoken_answers import SpokenAnswer, read_answers
from stepaudio_train.evaluation.token_probe import LanguageClassifier, TokenProbe
from stepaudio_train.tokenizers.speech import SpeechTokens

RATE_HZ = 16000
SPEEDS = ["slow 5", "slow 3", "slow 1", None, "fast 1", "fast 3", "fast 5"]


def asked(*tags):
    return tuple(one for tag in tags if tag for one in TagVocabulary().parse(f"({tag})")[0])


def signed(tag):
    name, _, level = (tag or "").partition(" ")
    return {"fast": 1, "slow": -1}.get(name, 0) * int(level or 0)


def answer(tag=None, text="seven", duration_s=1.0, task="tts", **known):
    return SpokenAnswer("a", task, text, duration_s, asked(tag), **known)


def contour(f0_hz=200.0, level_db=-20.0, frames=40):
    f0_hz, level_db = (np.broadcast_to(value, frames).astype(np.float32) for value in (f0_hz, level_db))
    return Contour(f0_hz, level_db, 0.01)


def voice(notes, part_s=0.2, pause_s=0.0, level=0.3):
    """Waveform of a harmonic tone that steps through `notes`, in Hz."""
    parts = []
    for f0_hz in notes:
        time_s = np.arange(round(part_s * RATE_HZ)) / RATE_HZ
        parts += [sum(np.sin(2 * math.pi * f0_hz * n * time_s) for n in (1, 2, 3)), np.zeros(round(pause_s * RATE_HZ))]
    return (level / 3 * np.concatenate(parts)).astype(np.float32)


def text_of(groups):
    """Audio tokens of groups of five codes."""
    return "".join(
        f"<audio_{code + (0 if place < 2 else 1024)}>" for group in groups for place, code in enumerate(group)
    )


def write_lines(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


# Speed


def spoken_at_speeds(duration_s):
    """Every text at every speed; `duration_s` of (base, level)."""
    bases = {"seven": 1.0, "seven two": 1.7, "one two three": 2.9}
    return [answer(tag, text, duration_s(base, signed(tag))) for text, base in bases.items() for tag in SPEEDS]


def test_a_model_that_obeys_gets_full_marks_and_exchanged_tags_get_none():
    found = compare(spoken_at_speeds(lambda base, level: base * 1.1**-level))
    assert found["speed_control_spearman"] == pytest.approx(1.0)
    assert found["speed_pairs_in_order"] == 1.0
    assert abs(found["speed_control_spearman_permuted_tags"]) < 0.1
    assert found["speed_pairs_in_order_permuted_tags"] == pytest.approx(0.5, abs=0.05)
    assert 0.2 < found["speed_control_spearman_permuted_tags_spread"] < 0.7
    assert found["num_speed_answers"] == 21 and found["num_speed_pairs"] == 3 * 21


def test_a_deaf_model_gets_about_nothing():
    rng = np.random.default_rng(0)
    answers = [one for _ in range(10) for one in spoken_at_speeds(lambda base, _: base * rng.uniform(0.8, 1.2))]
    assert abs(compare(answers)["speed_control_spearman"]) < 0.2
    never = compare(spoken_at_speeds(lambda base, _: base))
    assert never["speed_control_spearman"] == 0.0 and never["speed_pairs_in_order"] == 0.5


def test_a_model_that_does_the_opposite_is_told():
    assert compare(spoken_at_speeds(lambda base, level: base * 1.1**level))["speed_control_spearman"] == pytest.approx(
        -1
    )


def test_edits_are_measured_by_direction_and_do_not_count_as_speech():
    spoken = spoken_at_speeds(lambda base, level: base * 1.1**-level)
    edits = [
        answer(tag, duration_s=length, task="edit")
        for tag, length in (("fast 5", 0.8), ("fast 1", 0.8), ("slow 2", 1.3))
    ]
    found = compare([*spoken, *edits])
    assert found["edit_speed_spearman"] == pytest.approx(1.0) and found["num_edit_speed_answers"] == 3
    assert found["num_speed_answers"] == len(spoken)


def test_what_is_not_asked_for_is_absent_and_not_zero():
    assert compare([answer(), answer(text="two")]) == {}
    # One level a text says nothing, nor do several tags at once.
    assert compare([answer("fast 2"), answer("slow 2", "two"), answer("happy 2, fast 1")]) == {}


# Moods


def test_moods_are_measured_against_the_speakers_neutral():
    answers = [
        answer(f"happy {level}" if level else None, speaker=speaker, sound=contour(base * 2 ** (level / 12)))
        for speaker, base in (("adam", 100.0), ("eve", 220.0))
        for level in range(6)
    ]
    found = compare(answers)
    assert found["happy_f0_spearman"] == pytest.approx(1.0) and found["num_happy_answers"] == 10
    assert found["happy_f0_range_spearman"] == 0.0 and found["happy_duration_spearman"] == 0.0
    assert abs(found["happy_f0_spearman_permuted_tags"]) < 0.2
    assert not any(name.startswith(("sad", "angry", "num_sad")) for name in found)
    # Speakers are asked for other levels, so that a mean over all they said would put 2 above 3.
    few = [one for one in answers if one.level({"happy": 1}) in ((0, 3, 5) if one.speaker == "adam" else (0, 2))]
    assert compare(few)["happy_f0_spearman"] == pytest.approx(1.0)


# Language


def test_the_share_of_languages_heard_stands_beside_chance():
    names = ("English", "Chinese", "Japanese", "Cantonese")
    right = [answer(name, str(n), heard_language=name) for name in names for n in range(10)]
    found = compare(right, truth=[replace(one, heard_language="English") for one in right])
    assert found["language_heard_share"] == 1.0
    assert found["language_heard_share_permuted_tags"] == pytest.approx(0.25, abs=0.03)
    assert found["language_heard_share_truth"] == 0.25


def test_the_classifier_tells_languages_by_their_pairs_of_codes():
    rng = np.random.default_rng(0)

    def speech(cycle):
        # The same codes in both languages, in another order.
        codes = [cycle[(start + n) % len(cycle)] for start in rng.integers(9, size=1) for n in range(30)]
        return SpeechTokens(np.array(codes[:20], np.int32), np.array(codes, np.int32))

    order = {"up": [1, 2, 3, 4], "down": [4, 3, 2, 1]}
    train = [(speech(cycle), name) for name, cycle in order.items() for _ in range(5)]
    classifier = LanguageClassifier.fit(*zip(*train, strict=True))
    assert all(classifier.classify(speech(cycle)) == name for name, cycle in order.items() for _ in range(5))
    unseen = SpeechTokens(np.array([900, 901], np.int32), np.array([4000, 4001, 4002], np.int32))
    assert classifier.classify(unseen) in order
    assert LanguageClassifier.fit([unseen], ["up"]) is None


# Melody and rhythm


def sung(notes, heard):
    return answer("singing", notes=tuple(notes), sound=Contour.of(torch.from_numpy(voice(heard))))


def test_a_melody_that_is_followed_correlates_in_any_key():
    melodies = ([0, 4, 7, 4, 0], [7, 4, 0], [0, 2, 4, 5])
    followed = [
        sung(m, [110 * 2 ** ((note + key) / 12) for note in m]) for m, key in zip(melodies, (0, 5, 12), strict=True)
    ]
    found = compare(followed)
    assert found["melody_pearson"] > 0.99 and found["melody_spearman"] > 0.95
    assert abs(found["melody_pearson_permuted_notes"]) < 0.15
    monotone = compare([sung(m, [150.0] * len(m)) for m in melodies])
    assert abs(monotone["melody_pearson"]) < 0.4 and monotone["num_melody_answers"] == 3


def test_regular_onsets_are_more_regular_than_others():
    def beats(starts_s):
        wave = np.zeros(round((starts_s[-1] + 0.5) * RATE_HZ), np.float32)
        for start_s in starts_s:
            word = voice([150.0], part_s=0.15)
            wave[round(start_s * RATE_HZ) :][: len(word)] = word
        return Contour.of(torch.from_numpy(wave))

    even = beats([0.3, 0.7, 1.1, 1.5, 1.9])
    assert even.onsets_s() == pytest.approx([0.3, 0.7, 1.1, 1.5, 1.9], abs=0.04)
    uneven = [beats([0.3, 0.6, 1.3, 1.5, 2.4]), beats([0.3, 1.2, 1.5, 1.8])]
    found = compare([answer("RAP", sound=even), *(answer(text=str(n), sound=sound) for n, sound in enumerate(uneven))])
    assert found["rap_interval_variation"] < 0.05 < 0.3 < found["untagged_interval_variation"]
    assert found["rap_more_regular_share"] == 1.0
    assert found["rap_more_regular_share_permuted_tags"] == pytest.approx(0.5, abs=0.15)
    assert math.isnan(beats([0.3, 0.7]).interval_variation)


# Correlations


def test_ranks_of_ties_are_shared():
    # By hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert spearman([(1, 5), (2, 7), (2, 8), (3, 9)]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([(1, 1), (2, 1)]) is None
    assert correlation([(1, 1), (1, 2), (1, 3)]) is None
    assert correlation([(1, 2), (2, 2), (3, 2)]) == 0.0


# The probe, and whole files


def song(rng, in_tokens=True):
    """Codes and waveform of six groups; a code names the pitch of its group, or nothing if the tokens are deaf."""
    pitches = rng.integers(8, size=6)
    said = pitches if in_tokens else rng.integers(8, size=6)
    return [[code] * 5 for code in said.tolist()], voice([120 * 2 ** (p / 12) for p in pitches], part_s=0.12)


@pytest.fixture
def corpus(tmp_path):
    """(name, how many, whether tokens carry pitch) -> a file of recordings with their tokens."""

    def write(name, count, in_tokens=True, seed=0, **fields):
        rng, lines = np.random.default_rng(seed), []
        for number in range(count):
            groups, wave = song(rng, in_tokens)
            soundfile.write(tmp_path / f"{name}{number}.wav", wave, RATE_HZ)
            line = {"task": "tts", "text": "la", "audio": f"{name}{number}.wav", "audio_tokens": text_of(groups)}
            lines.append(line | {"language": "en", "speaker": "adam"} | fields)
        return write_lines(tmp_path / f"{name}.jsonl", lines)

    return write


def test_the_probe_reads_pitch_where_the_tokens_carry_it(corpus):
    reference = read_answers(corpus("reference", 60), 0.04).answers
    held_out = read_answers(corpus("truth", 10, seed=1), 0.04).answers
    probe = TokenProbe.fit(reference)
    assert probe.r2(held_out)["f0"] > 0.8
    read, true = probe.contour(held_out[0]).f0_hz[4:-4], held_out[0].sound.f0_hz[4:-4]
    assert np.median(np.abs(12 * np.log2(read / true))) < 1.0
    deaf = read_answers(corpus("deaf", 60, in_tokens=False), 0.04).answers
    assert TokenProbe.fit(deaf[:50]).r2(deaf[50:])["f0"] < 0.3
    assert TokenProbe.fit([replace(one, sound=None) for one in reference]) is None


def melody_lines(count):
    """Answers in tokens alone that sing what is asked for."""
    rng, lines = np.random.default_rng(5), []
    for _ in range(count):
        groups, _ = song(rng)
        notes = [group[0] for group in groups]
        lines.append(
            {
                "task": "tts",
                "text": "la",
                "tags": ["singing"],
                "notes": notes,
                "speaker": "adam",
                "audio_tokens": text_of(groups),
            }
        )
    return lines


def test_answers_in_tokens_alone_are_heard_through_the_probe(tmp_path, corpus):
    answers = write_lines(tmp_path / "answers.jsonl", melody_lines(12))
    options = ControlOptions(answers, tmp_path / "out", corpus("reference", 60), corpus("truth", 10, seed=1))
    report = measure_control(options)
    assert report.found["melody_pearson"] > 0.8 and report.found["probe_f0_r2"] > 0.8
    assert "are told from their tokens" in report.summary()
    alone = measure_control(replace(options, reference=None, truth=None))
    assert "melody_pearson" not in alone.found and "--reference FILE" in alone.summary()
    deaf = measure_control(replace(options, reference=corpus("deaf", 60, in_tokens=False), truth=None))
    assert deaf.found["probe_f0_r2"] < 0.3 and "do not carry pitch well enough" in deaf.summary()


def test_languages_of_a_file_are_heard_and_missing_ones_named(tmp_path):
    def line(language, code, **fields):
        return {"text": "seven", "language": language, "audio_tokens": text_of([[code] * 5] * 6)} | fields

    known = [line("en", 1), line("zh", 2)] * 3
    answers = [line("en", 1, tags=["英文"]), line("zh", 1, tags=["Mandarin"]), line("zh", 2, tags=["Korean"])]
    paths = [write_lines(tmp_path / f"{n}.jsonl", lines) for n, lines in enumerate((answers, known, known))]
    report = measure_control(ControlOptions(paths[0], tmp_path / "out", *paths[1:]))
    assert report.found["language_heard_share"] == 0.5 and report.found["num_language_answers"] == 2
    assert report.found["languages_heard"] == {"Chinese": {"English": 1}, "English": {"English": 1}}
    assert report.found["language_classifier_accuracy_truth"] == 1.0
    assert "Korean: no such recordings" in report.summary()


def test_files_are_measured_and_reported(tmp_path):
    lines = []
    for tag in SPEEDS:
        name = f"{(tag or 'plain').replace(' ', '')}.wav"
        soundfile.write(tmp_path / name, np.pad(voice([120.0], part_s=1.0 * 1.1 ** -signed(tag)), 3200), RATE_HZ)
        lines.append({"id": name, "task": "tts", "text": "seven", "tags": [tag] if tag else [], "audio": name})
    lines += [
        {"task": "asr", "answer": "seven"},
        '{"task": "tts"',
        {"text": "seven", "tags": ["fsat 2"], "audio": "fast1.wav"},
        {"text": "seven", "tags": ["fast 9"], "audio": "fast1.wav"},
        {"text": "seven", "audio": "missing.wav"},
        {"text": "seven", "audio_tokens": "<audio_1><audio_2000>"},
        {"text": "seven", "audio_tokens": ""},
        {"audio": "fast1.wav"},
        {"task": "ttz", "text": "seven", "audio": "fast1.wav"},
    ]
    path = write_lines(tmp_path / "answers.jsonl", lines)
    report = measure_control(ControlOptions(path, tmp_path / "out", truth=path))
    found = json.loads((tmp_path / "out" / "control.json").read_text())
    assert found["speed_control_spearman"] == found["speed_control_spearman_truth"] == pytest.approx(1.0)
    assert found["num_answers"] == 7 and found["num_refused"] == 16
    reasons = {refusal["name"].rsplit(":", 1)[1]: refusal["reason"] for refusal in found["refused"]}
    wanted = (
        "JSON",
        "did you mean 'fast'",
        "levels from 1 to 5",
        "missing.wav",
        "audio_tokens: id",
        "no speech",
        "text",
        "task",
    )
    for number, words in enumerate(wanted, 9):
        assert words in reasons[str(number)]
    assert list(found["duration_by_speed_level"]) == ["-5", "-3", "-1", "0", "1", "3", "5"]
    html = (tmp_path / "out" / "control.html").read_text()
    assert html.count("<svg") == 1 and "did you mean &#x27;fast&#x27;" in html
    assert control_section(found) in html
    assert "1.000" in report.summary() and "16 lines cannot be used" in report.summary()


def test_a_file_without_anything_usable_is_an_error(tmp_path):
    path = write_lines(tmp_path / "answers.jsonl", [{"text": "seven", "audio": "missing.wav"}])
    with pytest.raises(UserError, match=r"holds no spoken answer.*answers\.jsonl:1: .*missing\.wav"):
        measure_control(ControlOptions(path, tmp_path / "out"))
    with pytest.raises(UserError, match="no such file"):
        measure_control(ControlOptions(tmp_path / "none.jsonl", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
