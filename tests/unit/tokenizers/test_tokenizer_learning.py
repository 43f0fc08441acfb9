import math
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from stepaudio_train.audio.features import length_mask
from stepaudio_train.config.tokenizer import (
    AugmentConfig,
    EncoderTrainConfig,
    LinguisticConfig,
    SemanticConfig,
    SemanticLossConfig,
    TokenizerTrainConfig,
    tokenizer_problems,
)
from stepaudio_train.tokenizers.learning import probe
from stepaudio_train.tokenizers.learning.augment import corrupt, warp
from stepaudio_train.tokenizers.learning.clustering import assign, kmeans, perplexity
from stepaudio_train.tokenizers.learning.codebook import CodebookLearner
from stepaudio_train.tokenizers.learning.corpus import Clip, ClipFeatures, shuffled_batches, sorted_batches
from stepaudio_train.tokenizers.learning.linguistic_training import train_linguistic
from stepaudio_train.tokenizers.learning.probe import CodedClips, probe_word_error
from stepaudio_train.tokenizers.learning.recognition import (
    Alphabet,
    ctc_loss,
    greedy,
    normalise_transcript,
    word_error_rate,
    words_of,
)
from stepaudio_train.tokenizers.learning.semantic_training import train_semantic
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import EuclideanCodebook, SemanticTokenizer

NOTHING = AugmentConfig(
    speed=0.0, vocal_tract=0.0, equaliser_nats=0.0, noise_probability=0.0, time_masks=0, mel_masks=0
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_tone_clips(count: int, seed: int) -> list[Clip]:
    """Made-up words: `a` is a low tone, `b` a high one, in noise, one to three a clip."""
    generator = seeded(seed)
    clips = []
    for _ in range(count):
        letters = "".join("ab"[int(torch.randint(2, (), generator=generator))] for _ in range(1 + len(clips) % 3))
        pieces = []
        for letter in letters:
            time = torch.arange(3200) / 16000
            pitch_hz = (400.0 if letter == "a" else 2500.0) * (1 + 0.1 * float(torch.rand((), generator=generator)))
            pieces += [0.3 * torch.sin(2 * math.pi * pitch_hz * time), torch.zeros(800)]
        waveform = torch.cat(pieces)
        clips.append(Clip(waveform + 0.01 * torch.randn(len(waveform), generator=generator), " ".join(letters)))
    return clips


def test_no_augmentation_changes_nothing():
    features, lengths = torch.randn(3, 20, 8), torch.tensor([20, 5, 12])
    warped, counts = warp(features, lengths, NOTHING, seeded())
    inside = length_mask(lengths, 20)
    assert counts.tolist() == lengths.tolist()
    torch.testing.assert_close(warped[inside], features[inside], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(corrupt(features, lengths, NOTHING, seeded()), features)


def test_warp_changes_speed_and_mel_axis():
    ramp = torch.arange(100.0)[None, :, None] + 1000 * torch.arange(8.0)
    config = replace(NOTHING, speed=0.2)
    warped, counts = warp(ramp.expand(6, -1, -1), torch.full((6,), 100), config, seeded())
    assert len(set(counts.tolist())) > 1
    for row, count in zip(warped, counts.tolist(), strict=True):
        assert 83 <= count <= 125
        # Still a ramp over the clip's whole length, with another slope.
        torch.testing.assert_close(row[1, 0] - row[0, 0], torch.tensor(100 / count), atol=0.01, rtol=0.01)
    stretched, _ = warp(ramp, torch.tensor([100]), replace(NOTHING, vocal_tract=0.2), seeded())
    assert not torch.allclose(stretched[0, 0], ramp[0, 0])
    torch.testing.assert_close(stretched[0, :, 0], ramp[0, :, 0])


def test_noise_fills_the_quiet_and_leaves_the_loud():
    features = torch.full((4, 50, 8), -20.0)
    features[:, 10] = 5.0
    config = replace(NOTHING, noise_probability=1.0, noise_floor_nats=(6.0, 6.0))
    noisy = corrupt(features, torch.full((4,), 50), config, seeded())
    assert (noisy[:, 10] - 5.0).abs().max() < 0.3
    assert -5.5 < noisy[:, 20:].mean() < 3.0


def test_masks_hide_stripes_with_the_mean():
    features = torch.randn(8, 40, 16, generator=seeded())
    config = replace(NOTHING, time_masks=1, time_mask_frames=6, mel_masks=1, mel_mask_bins=4)
    masked = corrupt(features, torch.full((8,), 40), config, seeded(1))
    changed = masked != features
    assert changed.any() and changed.float().mean() < 0.5
    for row, clip, original in zip(changed, masked, features, strict=True):
        assert torch.allclose(clip[row], original.mean(), atol=1e-5)


def test_every_clip_is_drawn_once_an_epoch_in_even_batches():
    lengths = [10, 300, 20, 40, 80, 75, 120, 33, 12, 290]
    data = ClipFeatures([torch.zeros(length, 4) for length in lengths], [""] * len(lengths))
    batches = shuffled_batches(data, 4.0, seeded())
    drawn = Counter()
    for batch in batches:
        drawn.update(batch)
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 400
        if drawn.total() == 2 * len(lengths):
            break
    assert set(drawn.values()) == {2}
    assert sorted(index for batch in sorted_batches(data, 4.0) for index in batch) == list(range(len(lengths)))


def test_features_are_levelled_and_keep_their_texts():
    clips = [Clip(0.001 * torch.randn(1600 * (3 - i)), f"text {i}") for i in range(3)] + [Clip(torch.zeros(100), "no")]
    data = ClipFeatures.compute(clips, LinguisticTokenizer(LinguisticConfig()).features)
    assert sorted(zip(map(len, data.features), data.texts, strict=True)) == [
        (8, "text 2"),
        (18, "text 1"),
        (28, "text 0"),
    ]


def test_kmeans_finds_the_clusters():
    centres = 10 * torch.randn(6, 3, generator=seeded(2))
    points = (centres[:, None] + 0.1 * torch.randn(6, 40, 3, generator=seeded())).reshape(-1, 3)
    found = kmeans(points, 6, 10, seeded())
    labels, distances = assign(points, found)
    assert distances.max() < 1.0
    assert sorted(torch.bincount(labels).tolist()) == [40] * 6
    assert perplexity(labels, 6) == pytest.approx(6.0)
    assert torch.equal(found, kmeans(points, 6, 10, seeded()))


def test_dead_codes_come_back():
    codebook = EuclideanCodebook(4, 2)
    learner = CodebookLearner(codebook, 0.5, seeded())
    learner.start(torch.randn(50, 2, generator=seeded()) * 0.01)
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]).repeat(25, 1)
    for _ in range(30):
        learner.update(points, codebook.encode(points))
    assert sorted(map(tuple, codebook.embed.round().abs().tolist())) == [(0, 1), (0, 1), (1, 0), (1, 0)]
    assert len(codebook.encode(points).unique()) == 4


def test_codes_are_moved_where_the_tokenizer_has_them():
    # As when a model goes to a device: buffers are replaced, and the old ones are nobody's.
    codebook = EuclideanCodebook(4, 2)
    learner = CodebookLearner(codebook, 0.5, seeded())
    torch.nn.ModuleList([codebook, learner]).to(torch.float64)
    points = torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    learner.start(points)
    assert codebook.embed.abs().sum() > 0
    before = codebook.embed.clone()
    learner.update(points, codebook.encode(points))
    assert not torch.equal(codebook.embed, before)


def test_transcripts_are_normalised():
    assert normalise_transcript("  Hello,  WORLD! It's ５ ") == "hello world it's 5"
    assert words_of("打开 light 灯") == ["打", "开", "light", "灯"]


def test_few_words_are_labels_themselves_and_many_are_spelt():
    few = Alphabet(["ab", "B c"])
    assert (few.num_labels, few.labels_per_token) == (4, 1)
    assert few.decode(few.encode("C, ab! x b")) == "c ab b"
    many = Alphabet([f"{a}{b}" for a in "abcdefghijklmnop" for b in "qrstuvwxyzabcd"])
    assert (many.num_labels, many.labels_per_token) == (27, 2)
    assert many.decode(many.encode("Cab?")) == "cab"


def test_word_error_rate_counts_characters_of_mandarin():
    assert word_error_rate(["one two", "打开"], ["one", "打关"]) == pytest.approx(50.0)
    assert word_error_rate(["one two three"], [""]) == pytest.approx(100.0)


def test_ctc_loss_is_the_sum_over_paths_and_greedy_reads_it_back():
    logits = torch.tensor([[[0.1, 0.7, 0.2], [0.6, 0.3, 0.1]]]).log()
    # Of two places, the label 1 alone is read from (1, 1), (1, blank) and (blank, 1).
    likelihood = 0.7 * 0.3 + 0.7 * 0.6 + 0.1 * 0.3
    assert float(ctc_loss(logits, torch.tensor([2]), [[1]])) == pytest.approx(-math.log(likelihood), rel=1e-5)
    assert float(ctc_loss(logits, torch.tensor([2]), [[1, 1, 2]])) == 0.0
    best = torch.nn.functional.one_hot(torch.tensor([[1, 1, 0, 1, 2, 2]]), 3).float()
    assert greedy(best, torch.tensor([5])) == [[1, 1, 2]]


def test_probe_reads_words_from_codes(short_probe):
    generator = seeded()
    words = [("a", [3, 4]), ("b", [7, 8])]

    def made(count: int) -> CodedClips:
        picks = torch.randint(2, (count, 2), generator=generator).tolist()
        codes = [torch.tensor([code for pick in row for code in words[pick][1]]) for row in picks]
        return CodedClips(codes, [" ".join(words[pick][0] for pick in row) for row in picks])

    train, held_out = made(100), made(40)
    alphabet = Alphabet(train.texts)
    assert probe_word_error(train, held_out, 10, alphabet, seeded()) < 5.0
    unrelated = CodedClips([torch.randint(10, (4,), generator=generator) for _ in train.texts], train.texts)
    assert probe_word_error(unrelated, held_out, 10, alphabet, seeded()) > 40.0


TRAINING = EncoderTrainConfig(steps=150, batch_s=4.0, learning_rate=4e-3)


@pytest.fixture
def short_probe(monkeypatch):
    monkeypatch.setattr(probe, "_STEPS", 80)


def test_linguistic_training_learns_words_and_repeats_itself(short_probe):
    config = LinguisticConfig(num_mel_bins=20, hidden_size=32, num_heads=2, ffn_size=64, num_blocks=2, codebook_size=24)
    data = [
        ClipFeatures.compute(two_tone_clips(count, seed), LinguisticTokenizer(config).features)
        for seed, count in enumerate((60, 20))
    ]
    steps: list[int] = []
    runs = [
        train_linguistic(config, TRAINING, AugmentConfig(), *data, 0, "cpu", lambda step, _: steps.append(step))
        for _ in range(2)
    ]
    assert steps == [*range(1, 151)] * 2
    metrics = runs[0][1]
    assert metrics["ctc_word_error"] < 10 and metrics["probe_word_error"] < 10
    assert 2 < metrics["perplexity"] <= metrics["codes_used"] <= 24
    for name, tensor in runs[0][0].state_dict().items():
        assert torch.equal(tensor, runs[1][0].state_dict()[name]), name


def test_semantic_training_learns_words_and_spectrum(short_probe):
    config = SemanticConfig(num_mel_bins=20, hidden_size=32, num_heads=2, num_blocks=2, codebook_size=24)
    data = [
        ClipFeatures.compute(two_tone_clips(count, seed), SemanticTokenizer(config).features)
        for seed, count in enumerate((60, 20))
    ]
    history: list[dict[str, float]] = []
    _, metrics = train_semantic(
        config,
        TRAINING,
        SemanticLossConfig(),
        AugmentConfig(),
        *data,
        0,
        "cpu",
        lambda _, values: history.append(values),
    )
    assert metrics["ctc_word_error"] < 10 and metrics["probe_word_error"] < 10
    assert history[-1]["spectrum"] < 0.6 * history[0]["spectrum"]
    assert history[0]["commitment"] == 0 < history[-1]["commitment"]
    assert metrics["codes_used"] > 4


def test_configuration_problems_are_found_together():
    assert tokenizer_problems(TokenizerTrainConfig()) == []
    config = TokenizerTrainConfig(
        text_size=100,
        linguistic=LinguisticConfig(hidden_size=100, num_heads=8, codebook_size=2000),
        semantic_training=EncoderTrainConfig(steps=0),
    )
    problems = tokenizer_problems(config)
    assert len(problems) == 4
    assert any("linguistic.hidden_size=112" in problem for problem in problems)


def test_batches_never_end():
    data = ClipFeatures([torch.zeros(50, 4)], ["x"])
    assert list(islice(shuffled_batches(data, 1.0, seeded()), 3)) == [[0]] * 3
