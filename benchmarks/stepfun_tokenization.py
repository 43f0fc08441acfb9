"""The way StepFun's inference code tokenises: one file at a time, FunASR chunk after chunk, then ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from stepaudio_train.audio import peak_normalise
from stepaudio_train.audio.features import normalise_log_mel
from stepaudio_train.testing.reference_packages import funasr_cache, funasr_encoder
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.released.onnx_writing import write_semantic_onnx
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import SpeechTokens, semantic_pieces

_CHUNK_SAMPLES, _KEPT_SAMPLES = 3840, 320


class OneFileAtATime:
    """The same weights as two of the project's tokenizers, in the packages that StepFun's tokenizer.py calls."""

    def __init__(
        self, linguistic: LinguisticTokenizer, semantic: SemanticTokenizer, folder: Path, onnx_threads: int
    ) -> None:
        """
        Args:
            folder: for the ONNX file; onnx_threads: StepFun's code sets 1.
        """
        self._front, self._semantic = linguistic, semantic
        self._encoder = funasr_encoder(linguistic.config)
        self._encoder.load_state_dict(linguistic.encoder.state_dict())
        path = folder / "speech_tokenizer_v1.onnx"
        if not path.is_file():
            write_semantic_onnx(semantic, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = onnx_threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [given.name for given in self._session.get_inputs()]

    @torch.inference_mode()
    def encode(self, waveform: Tensor) -> SpeechTokens:
        """Codes of [samples] at 16 kHz."""
        waveform = peak_normalise(waveform)
        return SpeechTokens(self._linguistic_codes(waveform), self._semantic_codes(waveform))

    def _linguistic_codes(self, waveform: Tensor) -> np.ndarray:
        front, config = self._front, self._front.config
        cache = funasr_cache(config)
        frames = torch.zeros(0, config.num_mel_bins)
        outputs = []
        for start in range(0, len(waveform), _CHUNK_SAMPLES):
            samples = waveform[max(0, start - _KEPT_SAMPLES) : start + _CHUNK_SAMPLES]
            values, count = front.features(samples[None], torch.tensor([len(samples)]))
            new = values[0, : int(count)]
            if not len(new):
                break
            frames = torch.cat([frames if start else new[:1].expand(3, -1), new])
            if len(frames) < config.lfr_window:
                break
            if start + _CHUNK_SAMPLES > len(waveform):
                frames = torch.cat([frames, frames[-1:].expand(config.lfr_window, -1)])
                number = -(-(len(frames) - config.lfr_window - 3) // config.lfr_stride)
            else:
                number = config.chunk_frames
            stacked = frames.unfold(0, config.lfr_window, config.lfr_stride).transpose(1, 2).flatten(1)[:number]
            hidden, _, _ = self._encoder.forward_chunk(front.normalise(stacked)[None], torch.tensor([number]), cache)
            outputs.append(hidden[:, -number:])
            frames = frames[-1:]
        if not outputs:
            return np.zeros(0, dtype=np.int32)
        return torch.cdist(torch.cat(outputs, dim=1)[0], front.centroids).argmin(dim=1).numpy()

    def _semantic_codes(self, waveform: Tensor) -> np.ndarray:
        codes = [np.zeros(0, dtype=np.int32)]
        for piece in semantic_pieces(len(waveform), self._semantic.config):
            samples = waveform[piece.begin : piece.stop]
            mel, count = self._semantic.features(samples[None], torch.tensor([len(samples)]))
            mel = normalise_log_mel(mel, count).transpose(1, 2)
            given = dict(zip(self._names, (mel.numpy(), count.int().numpy()), strict=True))
            codes.append(self._session.run(None, given)[0].flatten())
        return np.concatenate(codes)
