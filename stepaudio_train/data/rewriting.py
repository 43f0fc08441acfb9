"""Written answers as they would be spoken (paper 5.2.1): what rewrites them, and the rules for English and Chinese."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from stepaudio_train.data.spoken_markdown import Joints, speak_markdown


class RewriteError(ValueError):
    """One answer that could not be rewritten. The message says why, and names no record."""


class Rewriter(Protocol):
    """Gives answers a spoken style. Several threads may call it at once."""

    def rewrite(self, question: str, answer: str, language: str | None) -> str:
        """The answer as it would be spoken; empty where nothing of it can be.

        Args:
            question: what is answered; empty where that is not known.
            language: of the answer, such as `en` or `zh`; None tells it by the characters.

        Raises:
            RewriteError: this answer could not be rewritten.
            UserError: none can be.
        """
        ...


@dataclass(frozen=True)
class RuleRewriter:
    """Takes away what cannot be spoken, and writes signs and abbreviations as they are read.

    Applied twice, for the same language, it changes nothing more. In languages other than English and Chinese, signs
    and abbreviations stay.
    """

    max_sentences: int | None = None
    """As many are kept, from the beginning; None keeps all."""

    def rewrite(self, question: str, answer: str, language: str | None) -> str:
        """See `Rewriter`."""
        if language is None:
            kept = first_sentences(_spoken(answer, _OTHER_READING), self.max_sentences)
            language = language_of(kept, question)
        reading = _READINGS.get(language, _OTHER_READING)
        before, spoken = None, answer
        # Again, since taking one mark away may bring another to light, as a heading does that is "1. ...".
        while spoken != before:
            before, spoken = spoken, first_sentences(_spoken(spoken, reading), self.max_sentences)
        return spoken


def language_of(*texts: str) -> str:
    """`en`, `zh` or, for other scripts, `other`: what the first text that has letters is mostly written in.

    A word in Latin letters counts like a Chinese character.
    """
    for text in texts:
        counts = {name: len(letters.findall(text)) for name, letters in _SCRIPTS.items()}
        if any(counts.values()):
            return max(counts, key=counts.__getitem__)
    return "en"


def first_sentences(text: str, count: int | None) -> str:
    """The first `count` sentences; None gives all. A line's end ends a sentence too."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text if count is None or len(ends) < count else text[: ends[count - 1]].rstrip()


_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ffff"
_LATIN = r"A-Za-z\u00c0-\u024f"
_SCRIPTS = {
    "en": re.compile(rf"[{_LATIN}]+"),
    "zh": re.compile(rf"[{_HAN}]"),
    "other": re.compile(rf"[^\W\d_{_LATIN}{_HAN}]"),
}
_CLOSING = r"""["'”’)」』）]*"""
# No end: the full stop of an initial, of a list's number, of "No. 1", and any that a small letter follows.
_FULL_STOP = (
    r"(?<!\b[A-Z])(?<!^\d)(?<!^\d\d)(?<!\bSt)(?<!\bMt)\.(?!(?:(?<=\bNo\.)|(?<=\bFig\.)) \d)"
    rf"(?={_CLOSING}(?:\s+(?![a-z])|\Z))"
)
# A mark, and what closes behind it. A blank or a Chinese character follows a Latin one.
_SENTENCE_END = re.compile(rf"(?:[。！？]+|[!?]+(?=\W|\Z|[{_HAN}])|{_FULL_STOP}){_CLOSING}\s*|\n", re.MULTILINE)
_ADDRESS = re.compile(
    r"(?:https?://|www\.)(?:[A-Za-z0-9._~:/?#@!$&'*+,;=%-]|\([A-Za-z0-9._~-]*\))+(?<![.,:;!?'*~])"
    r"|(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"
)
_CITATION = re.compile(
    r"^\[[^\]\n]+\]:[ \t]+\S.*$|[ \t]*(?:\[\^?\d+(?:\s*[-,–]\s*\d+)*\](?:\([^)\s]*\))?|【\d[^】\n]*】)", re.MULTILINE
)
_EMOJI = re.compile(
    r":[a-z][a-z0-9_+-]*:(?!\w)"  # as chat programs write them
    "|[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\u20e3\u200d\ufe0e\ufe0f\U000e0020-\U000e007f]"
)

_BULLET = re.compile(r"^([ \t]*)[•·●▪◦‣■□◆➢✓✔✅]\ufe0f?[ \t]*", re.MULTILINE)
_NUMBER = re.compile(
    r"^([ \t]*)(?:[(（](\d{1,2})[)）]|(\d{1,2})(?:[.)](?=[^\d\s])|[、．）])|[①-⑳])[ \t]*", re.MULTILINE
)
_LIST_NUMBER = re.compile(r"^([ \t]*\d{1,9})([.)])(?=\s|\Z)", re.MULTILINE)

# A dollar opens a formula before what is no blank, and closes it behind what is none and not before a digit.
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$(?=[^\s$])([^$\n]*[^\s$])\$(?!\d)", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_ROOT = re.compile(r"\\sqrt\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_COMMANDS = {
    "times": "×",
    "cdot": "×",
    "div": "÷",
    "approx": "≈",
    "neq": "≠",
    "ne": "≠",
    "pm": "±",
    "le": "≤",
    "leq": "≤",
    "ge": "≥",
    "geq": "≥",
    "circ": "°",
    "to": "→",
    "rightarrow": "→",
    **dict.fromkeys(("left", "right", "text", "mathrm", "mathbf", "boxed", "quad", "qquad"), " "),
}

_OPERATORS = {
    r"<=(?!>)": "≤",
    r">=": "≥",
    r"!=": "≠",
    r"[-=]>": "→",
    r"={2,}": "=",
    r"(?<=[\w)]) \+ (?=[\w(])|(?<=\d)\+(?=\d)": "＋",
    r"(?<=[\d)]) - (?=[\d(])": "−",
    r"(?<=[\w)]) < (?=[\w(])|(?<=\d)<(?=\d)": "＜",
    r"(?<=[\w)]) > (?=[\w(])|(?<=\d)>(?=\d)": "＞",
    r"(?<=[\d%％]) ?[–~～] ?(?=\d)": "→",
    r"\^\{?2\}?(?!\w)": "²",
    r"\^\{?3\}?(?!\w)": "³",
}
"""What a keyboard has for the signs in `_SIGNS`."""
_SIGNS = {
    "＋": ("plus", "加"),
    "−": ("minus", "减"),
    "×": ("times", "乘以"),
    "÷": ("divided by", "除以"),
    "=": ("equals", "等于"),
    "≠": ("is not", "不等于"),
    "≈": ("is about", "约等于"),
    "±": ("plus or minus", "正负"),
    "≤": ("is at most", "小于等于"),
    "≥": ("is at least", "大于等于"),
    "→": ("to", "到"),
    "&": ("and", "和"),
    "＜": ("is less than", "小于"),
    "＞": ("is more than", "大于"),
    "√": ("the square root of", "根号"),
    "²": ("squared", "的平方"),
    "³": ("cubed", "的立方"),
    "^": ("to the power of", "的幂"),
    "%": ("percent", ""),
    "％": ("percent", ""),
    "°": ("degrees", "度"),
    "°C": ("degrees Celsius", "摄氏度"),
    "℃": ("degrees Celsius", "摄氏度"),
    "°F": ("degrees Fahrenheit", "华氏度"),
    "℉": ("degrees Fahrenheit", "华氏度"),
}
"""Sign -> how English and Chinese read it where it stands."""
_MONEY = {
    "$": ("dollars", "美元"),
    "€": ("euros", "欧元"),
    "£": ("pounds", "英镑"),
    "¥": ("yuan", "元"),
    "￥": ("yuan", "元"),
}
_AMOUNT = re.compile(
    r"([$€£¥￥]) ?(\d+(?:,\d{3})*(?:\.\d+)?)((?: (?:thousand|million|billion|trillion)\b|[百千万亿]+)?)"
)
_ABBREVIATIONS = {
    "e.g.": "for example",
    "i.e.": "that is",
    "vs.": "versus",
    "approx.": "approximately",
    "w/o": "without",
    "mr.": "mister",
    "mrs.": "missus",
    "dr.": "doctor",
    "prof.": "professor",
}


def _english_abbreviation(found: re.Match[str]) -> str:
    spoken = _ABBREVIATIONS[found[0].lower()]
    return spoken.capitalize() if found[0][0].isupper() else spoken


def _english_amount(found: re.Match[str]) -> str:
    name = _MONEY[found[1]][0]
    return f"{found[2]}{found[3]} {name.removesuffix('s') if found[2] + found[3] == '1' else name}"


def _chinese_amount(found: re.Match[str]) -> str:
    return f"{found[2]}{found[3].strip()}{_MONEY[found[1]][1]}"


_Rule = tuple[str, str | Callable[[re.Match[str]], str]]


@dataclass(frozen=True)
class _Reading:
    """How a language reads what is not words."""

    joints: Joints
    fraction: str = r"\1/\2"
    rules: tuple[_Rule, ...] = ()
    """In the order in which they are applied."""


def _sign_rule(signs: Mapping[str, str], blank: str) -> _Rule:
    longest_first = sorted(signs, key=len, reverse=True)
    return rf"[ \t]*({'|'.join(map(re.escape, longest_first))})[ \t]*", lambda f: f"{blank}{signs[f[1]]}{blank}"


_ENGLISH = _Reading(
    Joints(".", " ", ", ", ", ", ": ", " "),
    r"\1 over \2",
    (
        *_OPERATORS.items(),
        (r"\betc\.(?=\s*(?:\Z|\n|[A-Z]))", "and so on."),
        (r"\betc\.", "and so on"),
        (rf"(?i)\b(?:{'|'.join(map(re.escape, _ABBREVIATIONS))})(?!\w)", _english_abbreviation),
        (_AMOUNT.pattern, _english_amount),
        (r"(?<=\d) ?([$€£¥￥])", lambda found: f" {_MONEY[found[1]][0]}"),
        _sign_rule({sign: words for sign, (words, _) in _SIGNS.items()}, " "),
    ),
)
_CHINESE = _Reading(
    Joints("。", "", "、", "，", "：", ""),
    r"\2分之\1",
    (
        *_OPERATORS.items(),
        (r"(?i)\be\.g\.[,，]?\s*", "例如"),
        (r"(?i)\bi\.e\.[,，]?\s*", "也就是"),
        (r"(?i)\s*\bvs\b\.?\s*", "对"),
        (_AMOUNT.pattern, _chinese_amount),
        (r"(?<=[\d百千万亿]) ?([$€£¥￥])", lambda found: _MONEY[found[1]][1]),
        (r"(\d+(?:[.,]\d+)*) ?[%％]", r"百分之\1"),
        (r" ?\^ ?\{?(\w+)\}?", r"的\1次方"),
        _sign_rule({sign: words for sign, (_, words) in _SIGNS.items()}, ""),
    ),
)
_OTHER_READING = _Reading(_ENGLISH.joints)
_READINGS = {"en": _ENGLISH, "zh": _CHINESE}

_TIDY: tuple[_Rule, ...] = (
    (r"[*`\\{}]+|~~+|(?<!\w)#+|(?<=\w)[~～](?!\w)", ""),
    (r"[_|]+", " "),
    (r"[ \t\u00a0\u3000]+", " "),
    (r"\( ?\)|（ ?）|\[ ?\]|【 ?】|< ?>", ""),
    (r"\.{2,}|…{2,}|。{2,}", "…"),
    (r"([!！?？,，;；:：、])(?: ?\1)+", r"\1"),
    (r"[!?！？]*([!?！？])", r"\1"),
    (r"[,，、:：;；] ?(?=[.。!！?？](?!\d))", ""),
    (r" +", " "),
    (r" (?=[,.!?;:)，。！？；：、）…](?!\d))", ""),
    (r"(?<=[(（]) ", ""),
    (r"(?m)^[ ,，、;；。]+", ""),
)


def _spoken(text: str, reading: _Reading) -> str:
    """One pass over a text."""
    text = _FORMULA.sub(lambda formula: _read_formula("".join(filter(None, formula.groups())), reading), text)
    text = speak_markdown(_plain_lists(_CITATION.sub("", text)), reading.joints)
    text = _EMOJI.sub("", _ADDRESS.sub("", text))
    for pattern, replacement in (*reading.rules, *_TIDY):
        text = re.sub(pattern, replacement, text)
    lines = (line.strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if re.search(r"\w", line))


def _plain_lists(text: str) -> str:
    """All lists as Markdown writes them, and nothing else that looks like its lists or its emphasis."""
    text = _BULLET.sub(r"\1- ", text)
    text = _NUMBER.sub(lambda found: f"{found[1]}{found[2] or found[3] or 1}. ", text)
    if len(_LIST_NUMBER.findall(text)) == 1:  # an answer, and no list
        text = _LIST_NUMBER.sub(r"\1\\\2", text)
    return re.sub(r"(?<=\d) ?\* ?(?=\d)", "×", text)


def _read_formula(formula: str, reading: _Reading) -> str:
    """LaTeX as signs and words."""
    before = None
    while formula != before:  # from the inside to the outside
        before, formula = formula, _ROOT.sub(r"√\1", _FRACTION.sub(reading.fraction, formula))
    formula = _COMMAND.sub(lambda found: _COMMANDS.get(found[1], found[1] if found[1].isalnum() else " "), formula)
    formula = re.sub(r"(?<=[\w)}])\s*-\s*(?=\S)", " − ", re.sub(r"\s*([+<>])\s*", r" \1 ", formula))
    return re.sub(r"[{_\s]+", " ", formula.replace("}", "")).strip()
