"""Next-token loss by hand."""

import torch

from stepaudio_train.data.batch import TASKS, TokenBatch
from stepaudio_train.objectives.base import TokenOutputs
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.tokenizers.vocabulary import Vocabulary


def test_sums_by_modality_and_task():
    vocabulary = Vocabulary(text_size=400)
    targets = torch.tensor([[5, 400, 1424, 5]])  # text, linguistic, semantic, text
    batch = TokenBatch(
        input_ids=torch.zeros_like(targets),
        targets=targets,
        loss_weights=torch.tensor([[1.0, 1.0, 0.5, 0.0]]),
        documents=torch.zeros(1, 4, dtype=torch.int32),
        tasks=torch.full((1, 4), TASKS.index("asr"), dtype=torch.int8),
    )
    out = LanguageModelling(vocabulary)(TokenOutputs(torch.tensor([[-1.0, -2.0, -4.0, -99.0]])), batch)
    assert out.loss_sum.item() == 1.0 + 2.0 + 2.0
    assert out.weight_sum.item() == 2.5
    assert out.metrics["loss"].tolist() == [5.0, 2.5]
    assert out.metrics["loss/text"].tolist() == [1.0, 1.0]
    assert out.metrics["loss/linguistic"].tolist() == [2.0, 1.0]
    assert out.metrics["loss/semantic"].tolist() == [2.0, 0.5]
    assert out.metrics["loss/task/asr"].tolist() == [5.0, 2.5]
    assert out.metrics["loss/task/tts"].tolist() == [0.0, 0.0]
