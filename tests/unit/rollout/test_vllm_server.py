"""Rollouts from a server, against one that answers as vLLM documents it: what is asked, read, and refused."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.rollout import RolloutConfig, rollout_problems
from stepaudio_train.data import json_posts
from stepaudio_train.engines.local import LocalEngine
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.weight_map import VALUE_HEAD
from stepaudio_train.rollout.rollouts import RolloutModel
from stepaudio_train.rollout.sampling import ANSWER_ENDS
from stepaudio_train.testing.small_runs import SMALL_RUN

MODEL = replace(SMALL_RUN.model, value_head=True)
EOT = ANSWER_ENDS[0]


class Served(ThreadingHTTPServer):
    """Answers [seed, how often weights were loaded], and ends where the prompt begins with 1."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict]] = []
        self.loaded: list[dict[str, torch.Tensor]] = []
        self.dev_mode = True
        self.failures: list[int] = []
        """Statuses of the next replies."""
        self.choice: dict = {}
        """What replaces parts of an answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Served

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self.server.asked.append((self.path, body))
        if self.server.failures:
            self._reply(self.server.failures.pop(), {"error": {"message": "the prompt is too long"}})
        elif self.path == "/v1/completions":
            self._reply(200, {"choices": [self._choice(body)]})
        elif self.path == "/collective_rpc" and self.server.dev_mode:
            assert body["method"] == "reload_weights"
            folder = Path(body["kwargs"]["weights_path"])
            self.server.loaded.append({k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()})
            self._reply(200, {"results": [None]})
        elif self.path == "/reset_prefix_cache" and self.server.dev_mode:
            self._reply(200, {})
        else:
            self._reply(404, {"detail": "Not Found"})

    def _choice(self, body: dict) -> dict:
        ends = body["prompt"][0] == 1
        ids = [body["seed"], len(self.server.loaded), *([EOT] if ends else [])]
        return {"text": "", "token_ids": ids, "finish_reason": "stop" if ends else "length", **self.server.choice}

    def _reply(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Not to the tests' output."""


@pytest.fixture
def served():
    with Served() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    engine = LocalEngine(replace(SMALL_RUN, model=MODEL))
    engine.load_weights(InitialWeights(MODEL, 0))
    return engine


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(json_posts.time, "sleep", lambda seconds: None)


def _config(served: Served, folder: Path) -> RolloutConfig:
    return RolloutConfig(
        max_new_tokens=9, temperature=0.7, server=f"{served.url}/v1", server_model="policy", server_weights=str(folder)
    )


def _refreshed(engine: LocalEngine, served: Served, folder: Path) -> RolloutModel:
    model = RolloutModel(engine, _config(served, folder))
    model.refresh(engine)
    return model


def test_the_server_loads_the_policys_weights_without_its_value_head(engine, served, tmp_path):
    model = _refreshed(engine, served, tmp_path / "weights")
    report = model.refresh(engine)
    exported = {name: tensor for name, tensor in engine.export_weights() if name not in VALUE_HEAD}
    assert len(served.loaded) == 2
    for loaded in served.loaded:
        assert loaded.keys() == exported.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in exported.items())
    assert [path for path, _ in served.asked] == ["/collective_rpc", "/reset_prefix_cache"] * 2
    assert report.num_bytes == sum(tensor.nbytes for tensor in exported.values())
    assert model.weights() == {}


def test_answers_are_by_ids_in_order_each_with_its_seed(engine, served, tmp_path):
    model = _refreshed(engine, served, tmp_path)
    prompts = [[1, 5], [2, 6], [1, 7, 8]] * 20
    answers = model.answer(prompts, range(60))
    assert [list(answer.prompt) for answer in answers] == prompts
    for seed, answer in enumerate(answers):
        assert answer.ended == (answer.prompt[0] == 1)
        assert answer.ids == ((seed, 1, EOT) if answer.ended else (seed, 1))
    asked = {body["seed"]: body for path, body in served.asked if path == "/v1/completions"}
    assert asked[2] == {
        "model": "policy", "prompt": [1, 7, 8], "max_tokens": 9, "temperature": 0.7, "top_p": 1.0, "top_k": -1,
        "min_p": 0.0, "repetition_penalty": 1.0, "seed": 2, "stop_token_ids": list(ANSWER_ENDS),
        "return_token_ids": True,
    }  # fmt: skip


def test_a_busy_server_is_asked_again(engine, served, tmp_path):
    model = _refreshed(engine, served, tmp_path)
    served.failures = [503, 429]
    assert [answer.ids for answer in model.answer([[2]], [7])] == [(7, 1)]
    assert [path for path, _ in served.asked].count("/v1/completions") == 3


@pytest.mark.parametrize(
    ("failures", "choice", "message"),
    [
        ([400], {}, "too long.*a prompt of 2 tokens was not answered"),
        ([404], {}, "see that rollout.server_model is right"),
        ([500] * 9, {}, "after 5 attempts"),
        ([], {"token_ids": None}, "no completion with token_ids"),
        ([], {"token_ids": [5], "finish_reason": "stop"}, "ended by 'stop' with no stop id"),
    ],
)
def test_what_is_no_answer_is_told(engine, served, tmp_path, failures, choice, message):
    model = _refreshed(engine, served, tmp_path)
    served.failures, served.choice = list(failures), choice
    with pytest.raises(UserError, match=message):
        model.answer([[1, 2]], [0])


def test_a_server_that_cannot_take_over_weights_is_told(engine, served, tmp_path):
    model = RolloutModel(engine, _config(served, tmp_path))
    served.dev_mode = False
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        model.refresh(engine)
    served.dev_mode, served.failures = True, [500]
    with pytest.raises(UserError, match="takes no weights_path is too old"):
        model.refresh(engine)
    with pytest.raises(RuntimeError, match="call refresh"):
        model.answer([[1]], [0])
    nobody = replace(_config(served, tmp_path), server="http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached.*see that the server runs there"):
        RolloutModel(engine, nobody).refresh(engine)


def test_half_a_configuration_is_refused(engine):
    config = RolloutConfig(server="localhost:8000", repetition_window=10)
    problems = rollout_problems(config, "rollout")
    assert [problem.split(":")[0] for problem in problems] == [
        "rollout.server_model",
        "rollout.server_weights",
        "rollout.server=localhost",
        "rollout.repetition_window=10",
    ]
    with pytest.raises(ConfigError):
        RolloutModel(engine, config)
    alone = rollout_problems(RolloutConfig(server_model="policy"), "rollout")
    assert alone == [
        "rollout.server_model=policy: has no effect without a server; type rollout.server=http://HOST:PORT"
    ]
