"""Spoken style from a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from dataclasses import dataclass

from stepaudio_train.data.chat_endpoint import ChatEndpoint, ReplyError
from stepaudio_train.data.rewriting import RewriteError, RuleRewriter

_PROMPT = """Rewrite the answer as a person would say it aloud to whoever asked the question. Keep its language, its \
facts and its meaning. Use short, simple, colloquial sentences. Write numbers, symbols and abbreviations as they are \
spoken. Use no lists, headings, Markdown, code, links or emoji. Reply with the rewritten answer and nothing else."""


@dataclass(frozen=True)
class EndpointRewriter:
    """Asks a model for the spoken form of each answer; what it writes goes through the rules once more."""

    endpoint: ChatEndpoint
    rules: RuleRewriter

    def rewrite(self, question: str, answer: str, language: str | None) -> str:
        """See `Rewriter`."""
        try:
            spoken = self.endpoint.ask(_PROMPT, {"question": question, "answer": answer}, str)
        except ReplyError as error:
            raise RewriteError(str(error)) from None
        return self.rules.rewrite(question, spoken, language)
