"""Chat data: what the rules make of answers, the endpoint, the filters, ASR copies, history, and what is refused."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.chat_endpoint import ChatEndpoint, ReplyCache
from stepaudio_train.data.chat_processing import ProcessOptions, ProcessReport, process
from stepaudio_train.data.endpoint_rewriter import EndpointRewriter
from stepaudio_train.data.prompts import ASR_PROMPT
from stepaudio_train.data.records import Record, TextPart, read_records
from stepaudio_train.data.rewriting import RewriteError, RuleRewriter, first_sentences, language_of

ENGLISH = {
    "# Weather\n\nIt is **sunny** and _warm_.\n\n\n\nBye": "Weather.\nIt is sunny and warm.\nBye",
    "Run `pip` so:\n\n```python\nprint(1)\n```\n\nDone": "Run pip so:\nDone",
    "See [the site](https://a.org/b_(c)) or ![a picture](a.png) here.": "See the site or here.",
    "Ask at https://a.org/x?y=1, or a.b@c.org.": "Ask at, or.",
    "You need:\n- Eggs\n- Milk": "You need:\nEggs, Milk.",
    "1. First, open it.\n2. Then read it": "First, open it. Then read it.",
    "- Fruit:\n  - apples\n  - pears\n- Done, at last": "Fruit: apples, pears. Done, at last.",
    "- [x] a long thing that has to be done\n- [ ] b": "a long thing that has to be done. b.",
    "42. Nothing else.": "42. Nothing else.",
    "7.": "7.",
    "|Name|Age|City|\n|-|-|-|\n|Ann|3|Rome|\n|Bob||Oslo|": "Ann: Age 3, City Rome. Bob: City Oslo.",
    "<b>You</b> &amp; me": "You and me",
    "Great 👍🏽!!! Really?!?! :smile: ok...": "Great! Really! ok…",
    "It rains [1], often [2, 3][^4].\n\n[1]: https://a.org": "It rains, often.",
    "Fruit, e.g. pears, i.e. sweet ones, etc. E.g. plums, etc. Ok": (
        "Fruit, for example pears, that is sweet ones, and so on. For example plums, and so on. Ok"
    ),
    "Dr. Who vs. Mr. No": "Doctor Who versus Mister No",
    "50% of 20°C": "50 percent of 20 degrees Celsius",
    "2*3 = 6, 2+3=5, 7 - 2 = 5, x < y, C++ and -5": (
        "2 times 3 equals 6, 2 plus 3 equals 5, 7 minus 2 equals 5, x is less than y, C++ and -5"
    ),
    "$1, $5 million, 3.5€ and 1990–2000": "1 dollar, 5 million dollars, 3.5 euros and 1990 to 2000",
    r"$$\frac{a}{\sqrt{2}} \le x_1^2$$": "a over the square root of 2 is at most x 1 squared",
}
CHINESE = {
    "## 天气\n\n今天**晴天**！！！\n\n\n再见😀": "天气。\n今天晴天！\n再见",
    "**注意：**看[这里](https://a.org)（https://b.org）。": "注意：看这里。",
    "1、苹果\n2、香蕉": "苹果、香蕉。",
    "①先打开门，再等。\n②关上门": "先打开门，再等。关上门。",
    "|名字|年龄|城市|\n|-|-|-|\n|小明|3|北京|": "小明：年龄3，城市北京。",
    "涨了50%，花了$5万，2+3=5，25℃，3~5天": "涨了百分之50，花了5万美元，2加3等于5，25摄氏度，3到5天",
    "A & B，x^2，x^n": "A和B，x的平方，x的n次方",
    r"等于$\frac{1}{2}$。": "等于2分之1。",
    "水果，e.g. 梨【1†来源】，好的～": "水果，例如梨，好的",
    "https://a.org，很好": "很好",
}
OTHER = {"**50%** & mehr, z. B. dies": "50% & mehr, z. B. dies"}


@pytest.mark.parametrize(
    ("language", "written", "spoken"),
    [(name, *pair) for name, pairs in (("en", ENGLISH), ("zh", CHINESE), ("de", OTHER)) for pair in pairs.items()],
)
def test_rules_give_what_is_spoken_and_then_nothing_more(language, written, spoken):
    rewriter = RuleRewriter()
    assert rewriter.rewrite("", written, language) == spoken
    assert rewriter.rewrite("", spoken, language) == spoken


@pytest.mark.parametrize("language", ["en", "zh", "de"])
@pytest.mark.parametrize("max_sentences", [None, 2])
def test_rules_applied_twice_change_nothing_more_whatever_is_written(language, max_sentences):
    pieces = [
        *"*_`#|$%&+=<>~^[]()!?.,:;-\n 5",
        "。",
        "，",
        "～",
        "世",
        "word ",
        "**",
        "```\n",
        "- ",
        "1. ",
        "1、",
        "(2) ",
    ]
    pieces += [
        "https://x.org/a_b",
        "[1]",
        "](http://a.b)",
        "|a|b|\n|-|-|\n",
        "\\frac{a}{b}",
        "    ",
        "e.g. ",
        "¥5",
        "<b>",
    ]
    rewriter, rng = RuleRewriter(max_sentences), random.Random(0)
    for _ in range(60):
        written = "".join(rng.choices(pieces, k=rng.randint(1, 40)))
        spoken = rewriter.rewrite("", written, language)
        assert rewriter.rewrite("", spoken, language) == spoken, repr(written)


def test_language_is_that_of_most_of_the_answer():
    assert language_of("Python是一种语言") == "zh"
    assert language_of("It means 你好.") == "en"
    assert language_of("これはペンです") == "other"
    assert language_of("50%", "涨了多少") == "zh"
    assert RuleRewriter().rewrite("涨了多少？", "50%", None) == "百分之50"
    code = "```python\nfor item in many_items: print(item)\n```"
    assert RuleRewriter().rewrite("", f"涨了50%\n{code}", None) == "涨了百分之50"


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One. Two! Three?", "One. Two!"),
        ('He said "No." She is J. K. Rowling, 3.5 m. Three.', 'He said "No." She is J. K. Rowling, 3.5 m.'),
        ("一。二！三？", "一。二！"),
        ("他说：“不。”二？三", "他说：“不。”二？"),
        ("One\nTwo. Three", "One\nTwo."),
        ("One. Two", "One. Two"),
        ("1. Paris. No. 1 at 5 p.m. on Sunday. Three.", "1. Paris. No. 1 at 5 p.m. on Sunday."),
        ("你好!真的吗?是。", "你好!真的吗?"),
    ],
)
def test_first_sentences(text, first):
    assert first_sentences(text, 2) == first
    assert first_sentences(text, None) == text


@dataclass
class Server:
    """An endpoint that answers with what it is told to, one after the other, and then with SPOKEN and a number."""

    url: str = ""
    replies: list[tuple[int, dict[str, Any] | str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


def completion(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}


@pytest.fixture
def server() -> Iterator[Server]:
    state, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.bodies.append(body)
                state.keys.append(self.headers["Authorization"])
                asked = json.loads(body["messages"][1]["content"])
                status, reply = state.replies.pop(0) if state.replies else (200, completion(f"So: {asked['answer']}"))
            content = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            self.send_response(status if self.path == "/v1/chat/completions" else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def endpoint(server: Server, tmp_path: Path) -> Callable[[], EndpointRewriter]:
    """A rewriter that is new, its cache read again."""

    def make() -> EndpointRewriter:
        cache = ReplyCache(tmp_path / "cache.jsonl")
        asked = ChatEndpoint(server.url, "m", cache, "secret", attempts=3, backoff_s=0.001)
        return EndpointRewriter(asked, RuleRewriter())

    return make


def test_endpoint_is_asked_again_and_its_answer_is_kept(server, endpoint, tmp_path):
    server.replies = [(503, "busy"), (429, "slowly"), (200, completion("<think>hm</think>\n**Seven**, or 5%."))]
    assert endpoint().rewrite("2 + 5?", "7", "en") == "Seven, or 5 percent."
    assert [body["model"] for body in server.bodies] == ["m"] * 3
    assert json.loads(server.bodies[0]["messages"][1]["content"]) == {"question": "2 + 5?", "answer": "7"}
    assert server.keys == ["Bearer secret"] * 3
    with (tmp_path / "cache.jsonl").open("a") as lines:
        lines.write('\n{"key": "half a li')  # as a killed run leaves it
    assert endpoint().rewrite("2 + 5?", "7", "en") == "Seven, or 5 percent."
    assert len(server.bodies) == 3
    assert endpoint().rewrite("2 + 5?", "8", "en") == "So: 8"
    assert endpoint().rewrite("2 + 5?", "8", "en") == "So: 8"
    assert len(server.bodies) == 4
    assert "secret" not in (tmp_path / "cache.jsonl").read_text() + repr(endpoint())


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ([(500, "")] * 3, "500.*after 3 attempts"),
        ([(400, "too long")], "400.*too long"),
        ([(200, "no json")], "no chat completion.*no json"),
        ([(200, {"choices": []})], "no chat completion"),
        ([(200, completion("Cut", "length"))], "cut off"),
        ([(200, completion("<think>hm</think>"))], "empty"),
    ],
)
def test_an_answer_that_cannot_be_had_is_refused(server, endpoint, replies, reason):
    server.replies = list(replies)
    with pytest.raises(RewriteError, match=reason):
        endpoint().rewrite("", "7", "en")
    assert len(server.bodies) == len(replies)
    assert endpoint().rewrite("", "7", "en") == "So: 7"  # nothing wrong was kept


def test_an_endpoint_that_refuses_everybody_ends_the_run(server, endpoint, tmp_path):
    server.replies = [(401, "wrong key")]
    with pytest.raises(UserError, match="--endpoint-key-env"):
        endpoint().rewrite("", "7", "en")
    cache = ReplyCache(tmp_path / "cache.jsonl")
    absent = ChatEndpoint("http://127.0.0.1:9", "m", cache, attempts=1)
    with pytest.raises(UserError, match="cannot be reached"):
        EndpointRewriter(absent, RuleRewriter()).rewrite("", "7", "en")


def spoken_question(audio: str = "clips/q.wav", text: str | None = "How many?", **more: Any) -> dict[str, Any]:
    part = {"type": "audio", "audio": audio, **({} if text is None else {"text": text}), **more}
    return {"role": "human", "content": [part]}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def conversation(id: str, *turns: dict[str, Any], **more: Any) -> str:
    return json.dumps({"id": id, "messages": turns, **more}, ensure_ascii=False)


Run = Callable[..., tuple[list[Record], ProcessReport]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Process lines; a recording of 1.5 s is there. Output into another folder."""
    (tmp_path / "in" / "clips").mkdir(parents=True)
    soundfile.write(tmp_path / "in" / "clips" / "q.wav", np.zeros(12000, np.int16), 8000)

    def process_lines(*lines: str, **options: Any) -> tuple[list[Record], ProcessReport]:
        source, output = tmp_path / "in" / "chat.jsonl", tmp_path / "out" / "new.jsonl"
        source.write_text("\n".join(lines), encoding="utf-8")
        report = process(ProcessOptions(source, output, **options))
        assert json.loads(output.with_name("new.jsonl.report.json").read_text())["records_out"] == report.records_out
        return list(read_records(output)), report

    return process_lines


def texts(record: Record) -> list[str]:
    return [part.text for message in record.messages for part in message.content if isinstance(part, TextPart)]


def test_without_options_records_stay_as_they_are_but_for_the_folder(run, tmp_path):
    records, report = run(
        conversation("a", spoken_question(), answer("**Seven**")), "", conversation("b", spoken_question(), answer("x"))
    )
    assert [record.id for record in records] == ["a", "b"]
    assert texts(records[0]) == ["**Seven**"]
    audio = records[0].audio_parts()[0].audio
    assert (tmp_path / "out" / audio).samefile(tmp_path / "in" / "clips" / "q.wav")
    assert (report.records_in, report.records_out, report.refused) == (2, 2, [])


@pytest.mark.parametrize(
    ("option", "just", "too_much", "reason"),
    [
        ("max_input_words", 5, 4, "5 words in its questions; --max-input-words is 4"),
        ("max_input_s", 1.5, 1.4, r"1.5 s of recordings in its questions; --max-input-s is 1.4"),
        ("max_answer_words", 3, 2, "3 words in its last answer; --max-answer-words is 2"),
    ],
)
def test_length_filter(run, option, just, too_much, reason):
    asked = {
        "role": "human",
        "content": [*spoken_question(text="你好 there, friend")["content"], {"type": "text", "text": "Now?"}],
    }
    line = conversation("a", asked, answer("one two, three"))
    earlier = conversation(
        "b", {"role": "human", "content": "Hi"}, answer("a b c d"), {"role": "human", "content": "O"}, answer("e")
    )
    records, report = run(line, **{option: just})
    assert len(records) == 1 and report.steps["length"].refused == 0
    _, report = run(line, earlier, **{option: too_much})
    assert [(refusal.name[-2:], refusal.reason) for refusal in report.refused] == [(":1", reason)]
    assert report.steps["length"].refused == 1 and report.records_out == 1


def test_seconds_are_those_told_or_those_of_the_codes_or_the_files(run):
    codes = "<audio_12><audio_40><audio_1030><audio_2000><audio_3001>" * 10  # 1.2 s
    _, report = run(
        conversation("told", spoken_question(duration_s=1.0), answer("a")),
        conversation("codes", spoken_question(audio="", tokens=codes), answer("a")),
        conversation("file", spoken_question(), answer("a")),
        conversation("missing", spoken_question("clips/none.wav"), answer("a")),
        max_input_s=1.1,
    )
    assert [refusal.name[-2:] for refusal in report.refused] == [":2", ":3", ":4"]
    assert report.refused[0].reason.startswith("1.2 s") and report.refused[1].reason.startswith("1.5 s")
    assert "none.wav" in report.refused[2].reason


def test_spoken_style_leaves_transcripts_and_what_is_asked(run):
    first = (
        spoken_question(),
        answer("**Seven**."),
        {"role": "human", "content": "**Why**?"},
        answer("Since 2+5=7. Yes. No."),
    )
    transcript = {
        "role": "human",
        "content": [*spoken_question(text="50%?")["content"], {"type": "text", "text": "And?"}],
    }
    recognised = ({"role": "system", "content": ASR_PROMPT}, spoken_question(), answer("50% & **more**"))
    records, report = run(
        conversation("chat", *first),
        conversation("asr", *recognised, task="asr"),
        conversation("taqta", transcript, answer("50%?\nIt is 50%."), task="taqta"),
        conversation("code", spoken_question(), answer("```\nx = 1\n```")),
        spoken_style="rules",
        max_answer_sentences=2,
    )
    assert texts(records[0]) == ["Seven.", "**Why**?", "Since 2 plus 5 equals 7. Yes."]
    assert texts(records[1])[-1] == "50% & **more**"
    assert texts(records[2])[-1] == "50%?\nIt is 50 percent."
    assert (report.steps["spoken_style"].changed, report.steps["spoken_style"].refused) == (2, 1)
    assert report.refused[0].name.endswith("chat.jsonl:4")
    assert report.refused[0].reason == "turn 2: nothing of the answer can be spoken"


def test_asr_copies_follow_from_id_and_seed(run):
    lines = [conversation(f"r{n}", spoken_question(), answer("Seven")) for n in range(200)]
    lines.append(conversation("silent", spoken_question(text=None), answer("Seven")))
    lines.append(conversation("asr", spoken_question(), answer("How many?"), task="asr"))

    def copied(*lines: str, **options: Any) -> list[Record]:
        return [record for record in run(*lines, **options)[0] if record.id.endswith("#asr")]

    half = copied(*lines, asr_copies=0.5)
    assert 70 < len(half) < 130
    assert copied(*reversed(lines), asr_copies=0.5) == half[::-1]
    assert copied(*lines, asr_copies=0.5, seed=1) != half
    assert len(copied(*lines, asr_copies=1.0)) == 200
    assert copied(*lines) == []
    assert half[0].task == "asr"
    assert texts(half[0]) == [ASR_PROMPT, "How many?"]
    assert half[0].audio_parts()[0].text == "How many?"


def test_history_becomes_text(run):
    two_rounds = (spoken_question(), answer("Seven"), spoken_question(text="Why?"), answer("So"))
    unheard = (spoken_question(text=None), *two_rounds[1:])
    voice = {"role": "assistant", "content": spoken_question()["content"]}
    synthesis = ({"role": "human", "content": "a"}, voice, {"role": "human", "content": "b"}, voice)
    records, report = run(
        conversation("two", *two_rounds),
        conversation("unheard", *unheard),
        conversation("tts", *synthesis, task="tts"),
        history="text",
    )
    assert texts(records[0]) == ["How many?", "Seven", "So"]
    assert [part.text for part in records[0].audio_parts()] == ["Why?"]
    assert len(records[1].audio_parts()) == 2
    assert report.steps["history"].changed == 1
    assert report.refused[0].name.endswith(":2") and "--history audio" in report.refused[0].reason


def test_lines_that_are_no_conversation_are_refused_by_line(run):
    good = conversation("a", spoken_question(), answer("x"))
    records, report = run("{", good, conversation("b", answer("x")), good.replace('"id"', '"name"'))
    assert len(records) == 1
    assert [refusal.name.rpartition(":")[2] for refusal in report.refused] == ["1", "3", "4"]
    assert "turn 1 is assistant" in report.refused[1].reason
    assert report.steps["read"].refused == 3
    assert "3 refused" in report.summary() and "chat.jsonl:3: turn 1" in report.summary()


def test_endpoint_rewrites_in_order_and_one_failure_costs_one_line(run, server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret\n")
    lines = [conversation(f"r{n}", spoken_question(), answer(str(n))) for n in range(40)]
    options = {"spoken_style": "endpoint", "endpoint": server.url, "endpoint_model": "m", "endpoint_key_env": "MY_KEY"}
    server.replies = [(400, "no")]
    records, report = run(*lines, **options)
    assert len(report.refused) == 1 and "400" in report.refused[0].reason
    kept = [f"So: {n}" for n in range(40) if not report.refused[0].name.endswith(f":{n + 1}")]
    assert [texts(record)[0] for record in records] == kept
    assert set(server.keys) == {"Bearer secret"}
    records, report = run(*lines, **options)
    assert len(records) == 40 and len(server.bodies) == 41  # what was paid for is not asked for again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spoken_style": "endpoint", "endpoint_model": "m"}, "--endpoint http://"),
        ({"spoken_style": "endpoint", "endpoint": "file:///etc/x", "endpoint_model": "m"}, "--endpoint http://"),
        ({"spoken_style": "endpoint", "endpoint": "http://a"}, "--endpoint-model NAME"),
        ({"endpoint": "http://a"}, "--spoken-style endpoint"),
        ({"max_answer_sentences": 2}, "--spoken-style rules"),
        ({"asr_copies": 1.5}, "between 0 and 1"),
        ({"max_input_s": float("nan")}, "--max-input-s nan: must be over 0"),
        ({"max_answer_words": 1}, "nothing of it is left.*chat.jsonl:1"),
    ],
)
def test_what_cannot_be_done_is_told_and_nothing_is_written(run, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(conversation("a", spoken_question(), answer("two words")), **options)
    assert not (tmp_path / "out" / "new.jsonl").exists()


def test_texts_that_stand_together_are_rewritten_as_one(run):
    question = {"role": "human", "content": "q"}
    parts = [{"type": "text", "text": text} for text in ("It is **sev", "en** and", " eight.")]
    records, _ = run(
        json.dumps({"messages": [question, {"role": "assistant", "content": parts}]}), spoken_style="rules"
    )
    assert records[0].messages[1].content == (TextPart("It is seven and eight."),)


def test_a_conversation_without_a_question_gets_no_asr_copy(run):
    records, report = run(json.dumps({"messages": [{"role": "system", "content": "Be brief."}]}), asr_copies=1.0)
    assert (len(records), report.asr_copies) == (1, 0)
