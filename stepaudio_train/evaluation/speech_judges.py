"""Who judges synthesised speech: recognisers, speaker encoders, models of listeners. Each is chosen by its name.

The default ones come inside Python packages and work offline; they are small and hear English. What a paper reports is
measured with larger ones (paper 6: Whisper-large-v3, Paraformer, ERes2Net), which are given as files or an address.
All waveforms are [samples] float32 at 16 kHz.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio_train.audio.features import SAMPLE_RATE_HZ, log_mel
from stepaudio_train.audio.preprocessing import trim_silence
from stepaudio_train.audio.reading import peak_normalise
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.judges import JudgeOptions
from stepaudio_train.evaluation.endpoint_recogniser import EndpointRecogniser
from stepaudio_train.evaluation.word_errors import normalise
from stepaudio_train.models.decoder.speaker import CachedEmbedding, CamPlusEmbedding, SpeakerEmbedding, check_voice

T = TypeVar("T")


class Recogniser(Protocol):
    """Writes down what is said."""

    def transcribe(self, waveform: Tensor) -> str:
        """Raises:
        JudgeError: not this waveform. UserError: none at all.
        """
        ...


class QualityJudge(Protocol):
    """Says how good speech sounds, without a reference."""

    def rate(self, waveform: Tensor) -> dict[str, float]:
        """Names of scores, and the scores."""
        ...


@dataclass(frozen=True)
class Judges:
    """Who judges; what None would measure is not measured."""

    recogniser: Recogniser | None = None
    speaker: SpeakerEmbedding | None = None
    quality: QualityJudge | None = None


def build_judges(options: JudgeOptions) -> Judges:
    """Raises:
    UserError: an unknown name, a package or file that is missing, or a word that pocketsphinx does not know.
    """
    speaker = _chosen("speaker", options.speaker, _SPEAKERS, options)
    return Judges(
        _chosen("recogniser", options.recogniser, _RECOGNISERS, options),
        # One prompt speaks for many clips.
        None if speaker is None else CachedEmbedding(speaker),
        _chosen("quality", options.quality, _QUALITIES, options),
    )


class PocketSphinx:
    """The English recogniser of the package `pocketsphinx`.

    Each recording is levelled and set in faint noise: the acoustic model has never heard digital silence. With the
    settings below, the word error of recorded digits (FSDD, 8 kHz) fell from 59 % to 28 %, and that of espeak's voices
    with 23 words from 64 % to 26 %. All of English is far harder: 89 % on the latter.
    """

    _QUIET_S = 0.2
    _NOISE = 8e-3

    def __init__(self, words: Sequence[str] = ()) -> None:
        """
        Args:
            words: all that is ever said, in any order; all English if not given.

        Raises:
            UserError: the package is missing, or has no pronunciation of a word.
        """
        known = list(dict.fromkeys(word for text in words for word in normalise(text).split()))
        self._decoder = _pocketsphinx_decoder(bool(known))
        if unknown := [word for word in known if self._decoder.lookup_word(word) is None]:
            raise UserError(
                f"pocketsphinx has no pronunciation of {', '.join(unknown)}; leave them out of the words, or choose "
                "another recogniser"
            )
        if known:
            grammar = f"#JSGF V1.0; grammar words; public <words> = ( {' | '.join(known)} )+;"
            self._decoder.add_jsgf_string("words", grammar)
            self._decoder.activate_search("words")

    def transcribe(self, waveform: Tensor) -> str:
        """See `Recogniser`."""
        around = round(self._QUIET_S * SAMPLE_RATE_HZ)
        padded = F.pad(0.7 * peak_normalise(waveform), (around, around))
        noise = self._NOISE * torch.randn(len(padded), generator=torch.Generator().manual_seed(0))
        samples = ((padded + noise).clamp(-1, 1) * 32767).to(torch.int16).numpy()
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return "" if found is None else found.hypstr


def hearable(texts: Sequence[str]) -> tuple[list[bool], tuple[str, ...]]:
    """Which texts `PocketSphinx` can hear, and the words of those, which `JudgeOptions.words` takes.

    It can where it knows how every word is spoken: Mandarin, names and empty texts are out.

    Raises:
        UserError: the package is missing.
    """
    decoder = _pocketsphinx_decoder(of_list=True)
    split = [normalise(text).split() for text in texts]
    known = {word for words in split for word in words if decoder.lookup_word(word) is not None}
    heard = [bool(words) and known.issuperset(words) for words in split]
    return heard, tuple(dict.fromkeys(word for words, can in zip(split, heard, strict=True) if can for word in words))


def _pocketsphinx_decoder(of_list: bool) -> Any:
    """English sounds, with the language model of all English or without any.

    Raises:
        UserError: the package is missing.
    """
    try:
        import pocketsphinx
    except ModuleNotFoundError:
        raise _missing("pocketsphinx", "'stepaudio-train[judges]'", "--recogniser") from None
    # The default language weight and insertion penalty are those of a language model; a list of words has none.
    of_words = {"lm": None, "lw": 1.0, "wip": 1e-16} if of_list else {}
    # The mean of a recording is its own, so that no result depends on what came before.
    return pocketsphinx.Decoder(samprate=SAMPLE_RATE_HZ, cmn="batch", loglevel="FATAL", **of_words)


class Whisper:
    """Whisper of any size, by transformers' pipeline."""

    _WINDOW_S = 30

    def __init__(self, folder: Path, language: str | None = None) -> None:
        """Raises:
        UserError: missing folder, or one that holds no such model as safetensors.
        """
        # Imported late: it costs seconds, and the other judges do not need it.
        from transformers import pipeline

        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give that of a model, as whisper:models/whisper-large-v3")
        try:
            # Safetensors: other weights are pickles, and may run code.
            weights = {"use_safetensors": True}
            self._pipeline = pipeline("automatic-speech-recognition", model=str(folder), model_kwargs=weights)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: cannot be loaded as a recogniser: {error}") from error
        self._options = {"generate_kwargs": {"language": language, "task": "transcribe"}} if language else {}

    def transcribe(self, waveform: Tensor) -> str:
        """See `Recogniser`."""
        heard = {"raw": waveform.numpy(), "sampling_rate": SAMPLE_RATE_HZ}
        # With timestamps it goes on where its window of 30 s ends.
        long = len(waveform) > self._WINDOW_S * SAMPLE_RATE_HZ
        return self._pipeline(heard, return_timestamps=long, **self._options)["text"]


class Resemblyzer(nn.Module):
    """The GE2E speaker encoder (Wan et al. 2018, arXiv 1710.10467) whose weights the package `resemblyzer` carries.

    The file of weights is read and none of the package's code runs, so that what that needs (librosa, numba, and
    webrtcvad, which must be compiled) need not be there. Silence is cut at both ends alone.
    """

    _MEL_BINS = 40
    _SIZE = 256
    _WINDOW, _STEP = 160, 77
    """Frames of 10 ms in a window, and from one to the next."""
    _COVERED = 0.75
    """Least share of the last window that a recording must fill, if there are others."""
    _LEVEL_DB = -30.0
    """Of full scale; quieter recordings are raised to it."""

    def __init__(self) -> None:
        """Raises:
        UserError: the package is missing.
        """
        super().__init__()
        self.lstm = nn.LSTM(self._MEL_BINS, self._SIZE, 3, batch_first=True)
        self.linear = nn.Linear(self._SIZE, self._SIZE)
        path = _file_in("resemblyzer", "pretrained.pt", "--no-deps resemblyzer", "--speaker")
        weights = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        self.load_state_dict({name: weights[name] for name in self.state_dict()})

    @torch.inference_mode()
    def embed(self, waveform: Tensor) -> Tensor:
        """See `SpeakerEmbedding`: [256], of length 1, none negative."""
        check_voice(waveform)
        level_db = 10 * waveform.square().mean().clamp(min=1e-10).log10()
        speech = trim_silence(waveform * 10 ** ((self._LEVEL_DB - level_db).clamp(min=0) / 20))
        starts = list(range(0, max(1, len(speech) // 160 - self._WINDOW + self._STEP + 2), self._STEP))
        if len(starts) > 1 and len(speech) / 160 - starts[-1] < self._COVERED * self._WINDOW:
            starts.pop()
        speech = F.pad(speech, (0, max(0, (starts[-1] + self._WINDOW) * 160 - len(speech))))
        powers = 10 ** log_mel(speech[None], torch.tensor([len(speech)]), self._MEL_BINS)[0][0]
        _, (hidden, _) = self.lstm(torch.stack([powers[start : start + self._WINDOW] for start in starts]))
        return F.normalize(F.normalize(self.linear(hidden[-1]).relu(), dim=1).mean(dim=0), dim=0)


class Dnsmos:
    """DNSMOS P.835 (Reddy et al. 2022, arXiv 2110.01763): what listeners would say of signal, background and overall.

    From 1 to 5. The package `speechmos` carries the ONNX file; its numbers are these but for windows that it loses by
    rounding.
    """

    _WINDOW, _STEP = 144160, SAMPLE_RATE_HZ
    # Highest power first.
    _CURVES: Mapping[str, tuple[float, ...]] = {
        "dnsmos_signal": (-0.08397278, 1.22083953, 0.0052439),
        "dnsmos_background": (-0.13166888, 1.60915514, -0.39604546),
        "dnsmos_overall": (-0.06766283, 1.11546468, 0.04602535),
    }

    def __init__(self) -> None:
        """Raises:
        UserError: the package is missing.
        """
        path = _file_in("speechmos", "dnsmos_models/sig_bak_ovr.onnx", "'stepaudio-train[judges]'", "--quality")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def rate(self, waveform: Tensor) -> dict[str, float]:
        """See `QualityJudge`. Shorter recordings are repeated to 9.01 s; longer ones judged every second."""
        speech = waveform.clamp(-1, 1)
        while len(speech) < self._WINDOW:
            speech = speech.repeat(2)
        count = max(1, len(speech) // self._STEP - 9)
        windows = speech.unfold(0, self._WINDOW, self._STEP)[:count].numpy()
        raw = np.array([self._session.run(None, {"input_1": window[None]})[0][0] for window in windows])
        columns = zip(self._CURVES.items(), raw.T, strict=True)
        return {name: float(np.polyval(curve, column).mean()) for (name, curve), column in columns}


def _endpoint(url: str, options: JudgeOptions) -> Recogniser:
    key = os.environ.get(options.endpoint_key_env, "").strip() or None
    return EndpointRecogniser(url, options.endpoint_model, options.language, key)


def _speaker_file(path: str, options: JudgeOptions) -> SpeakerEmbedding:
    return CamPlusEmbedding(Path(path), dimension=None)


_RECOGNISERS: dict[str, Callable[[str, JudgeOptions], Recogniser]] = {
    "pocketsphinx": lambda _, options: PocketSphinx(options.words),
    "whisper": lambda folder, options: Whisper(Path(folder), options.language),
    "endpoint": _endpoint,
}
_SPEAKERS: dict[str, Callable[[str, JudgeOptions], SpeakerEmbedding]] = {
    "resemblyzer": lambda _, options: Resemblyzer(),
    "campplus": _speaker_file,
    "eres2net": _speaker_file,
}
_QUALITIES: dict[str, Callable[[str, JudgeOptions], QualityJudge]] = {"dnsmos": lambda _, options: Dnsmos()}
_WITH_ARGUMENT = {"whisper": "FOLDER", "endpoint": "URL", "campplus": "FILE.onnx", "eres2net": "FILE.onnx"}


def _chosen(
    field: str, asked: str, known: Mapping[str, Callable[[str, JudgeOptions], T]], options: JudgeOptions
) -> T | None:
    """The judge of that name, built of what stands behind its colon."""
    if asked == "none":
        return None
    name, _, argument = asked.partition(":")
    if name not in known or bool(argument) != (name in _WITH_ARGUMENT):
        forms = [f"{name}:{_WITH_ARGUMENT[name]}" if name in _WITH_ARGUMENT else name for name in known]
        raise UserError(f"--{field} {asked}: is no such judge; type one of {', '.join([*forms, 'none'])}")
    return known[name](argument, options)


def _file_in(package: str, name: str, install: str, option: str) -> Path:
    """A file that an installed package carries; nothing of the package is imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise _missing(package, install, option)
    return Path(found.submodule_search_locations[0]) / name


def _missing(package: str, install: str, option: str) -> UserError:
    return UserError(f"{option}: the package {package} is missing; type: pip install {install}, or {option} none")
