"""The Triton kernels of the attention against float64, in Triton's interpreter where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from stepaudio_train.models.step1 import attention
from stepaudio_train.models.step1.attention import alibi_slopes, build_attention_bias, sqrt_alibi_attention
from stepaudio_train.models.step1.kernels import launch
from stepaudio_train.models.step1.kernels.launch import Tiles, document_spans
from stepaudio_train.testing.triton_interpreter import bfloat16_products

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks/attention_code.py"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def on_cpu(monkeypatch):
    """The interpreter with small tiles, so that a few dozen tokens make many of them."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here; the GPU tests run them")
    monkeypatch.setattr(launch, "TILES_OF_FLOAT32", Tiles(2, 32, 16, 1, 1))
    small = {"forward_kernel": Tiles(2, 32, 16, 1, 1), "dq_kernel": Tiles(2, 16, 32, 1, 1)}
    small["dk_dv_kernel"] = Tiles(2, 16, 32, 1, 1)
    monkeypatch.setattr(launch, "TILES", {128: {name: (tiles,) for name, tiles in small.items()}})
    with bfloat16_products():
        yield


def numbered(*lengths: int) -> torch.Tensor:
    """Document numbers [1, sum of lengths]."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(torch.int32)


def random_lengths(count: int, total: int, seed: int) -> list[int]:
    """`count` lengths of 1 or more that sum to `total`."""
    cuts = torch.randperm(total - 1, generator=torch.Generator().manual_seed(seed))[: count - 1].sort().values + 1
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([total])]).diff().tolist()


def make_inputs(documents, heads, groups, dim, dtype, num_queries=None, device="cpu"):
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    rows, keys = documents.shape
    queries = keys if num_queries is None else num_queries
    shapes = [(rows, queries, heads, dim), *[(rows, keys, groups, dim)] * 2, (rows, queries, heads, dim)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def run(backend, q, k, v, d_out, documents):
    """Output and gradients of q, k and v."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    bias = build_attention_bias(documents, alibi_slopes(q.shape[2]), q.dtype, backend, num_queries=q.shape[1])
    out = sqrt_alibi_attention(q, k, v, bias)
    out.backward(d_out)
    return [out.detach(), q.grad, k.grad, v.grad]


def relative_errors(inputs, documents) -> list[float]:
    """Of output and gradients, in the Euclidean norm, against scores written out in float64.

    Relative to at least a tenth of the norm of the output's gradient: those of q and k are 0 for one-token documents.
    """
    ours = run("triton", *inputs, documents)
    exact = run("reference", *(x.double() for x in inputs), documents)
    least = inputs[3].double().norm() / 10
    return [((a.double() - b).norm() / b.norm().clamp(min=least)).item() for a, b in zip(ours, exact, strict=True)]


CASES = {
    "one token": (numbered(1), 2, 1),
    "one document, odd length": (numbered(67), 2, 1),
    "edges within tiles": (numbered(1, 30, 1, 5, 34), 4, 2),
    "edges at tiles": (numbered(32, 16, 16), 2, 2),
    "two rows": (torch.cat([numbered(40, 1, 1), numbered(3, 39)]), 2, 1),
    "64 documents": (numbered(*random_lengths(64, 97, seed=1)), 2, 1),
    "three heads a group": (numbered(20, 13), 3, 1),
    "sixteen heads a group": (numbered(17, 4), 16, 1),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_float64(on_cpu, case, dtype):
    documents, heads, groups = CASES[case]
    inputs = make_inputs(documents, heads, groups, 16, dtype)
    assert max(relative_errors(inputs, documents)) < TOLERANCES[dtype]


@pytest.mark.parametrize("dim", [64, 128])
def test_head_dims_of_the_released_models(on_cpu, dim):
    documents = numbered(19, 14)
    assert max(relative_errors(make_inputs(documents, 2, 1, dim, torch.float32), documents)) < 1e-5


@pytest.mark.parametrize("num_queries", [1, 21, 45])
def test_queries_may_be_the_last_of_the_positions(on_cpu, num_queries):
    documents = numbered(9, 30, 20)
    inputs = make_inputs(documents, 2, 1, 16, torch.float32, num_queries)
    assert max(relative_errors(inputs, documents)) < 1e-5


def test_other_strides_give_the_same_bits(on_cpu):
    documents = torch.cat([numbered(5, 20), numbered(25)])
    inputs = make_inputs(documents, 2, 1, 16, torch.float32)
    # As Megatron-Core lays them out: tokens before rows; and, for the last, elements of a head apart.
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:3])
    d_out = inputs[3].transpose(2, 3).contiguous().transpose(2, 3)
    for ours, other in zip(run("triton", *inputs, documents), run("triton", q, k, v, d_out, documents), strict=True):
        assert torch.equal(ours, other)


def backward(q, k, v, d_out, documents, forward_of):
    """dq, dk and dv alone, from the output and the weights of `forward_of` = (q, k, v)."""
    constants = (alibi_slopes(q.shape[2]), *document_spans(documents))
    return launch._attention_backward(d_out, q, k, v, *constants, *launch._attention(*forward_of, *constants))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_only_needed_tiles_are_read(on_cpu, monkeypatch):
    """Tile by tile, what is not needed is NaN, which would spoil the result even at a weight of 0."""
    size = 16
    monkeypatch.setattr(launch, "TILES_OF_FLOAT32", Tiles(2, size, size, 1, 1))
    documents = numbered(20, 12, 18, 1, 13)
    q, k, v, d_out = make_inputs(documents, 2, 1, 16, torch.float32)
    out, dq, dk, dv = run("triton", q, k, v, d_out, documents)
    visible = (documents == documents.T).tril()
    needed = visible.unflatten(1, (-1, size)).unflatten(0, (-1, size)).any(3).any(1)  # [query tiles, key tiles]
    assert needed.sum() == 6  # of 10 at or below the diagonal
    for tile in range(len(needed)):
        part = slice(tile * size, (tile + 1) * size)

        def spoilt(x, kept):
            return x.masked_fill(~kept.repeat_interleave(size)[:, None, None], torch.nan)

        keys, values = spoilt(k, needed[tile]), spoilt(v, needed[tile])
        assert torch.equal(run("triton", q, keys, values, d_out, documents)[0][:, part], out[:, part])
        assert torch.equal(backward(q, keys, values, d_out, documents, (q, k, v))[0][:, part], dq[:, part])
        d_outs = spoilt(d_out, needed[:, tile])
        _, d_keys, d_values = backward(q, k, v, d_outs, documents, (q, k, v))
        assert torch.equal(d_keys[:, part], dk[:, part])
        assert torch.equal(d_values[:, part], dv[:, part])


def test_pytorch_takes_the_operation_as_it_takes_its_own(on_cpu):
    documents = numbered(3, 14)
    q, k, v, _ = make_inputs(documents, 2, 1, 16, torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(launch._attention, (*inputs, alibi_slopes(2), *document_spans(documents)))


def test_compiled_for_hopper_two_heads_share_a_root(tmp_path):
    results = tmp_path / "code.json"
    arguments = ["--head-dim", "16", "--candidates", "first", "--json", str(results)]
    finished = subprocess.run([sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    rows = json.loads(results.read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"forward", "dq", "dk_dv"}
    for row in rows:
        # One exponential and half a root a score, and in the forward one exponential a row and tile.
        assert 1.5 <= row["special"] < 1.6
        assert row["matmuls"] > 0 and row["spilled"] == 0


def test_spans_of_documents():
    starts, ends = document_spans(torch.tensor([[-1, -1, 0, 3, 3], [2, 2, 2, 2, 2]]))
    assert starts.tolist() == [[0, 0, 2, 3, 3], [0, 0, 0, 0, 0]]
    assert ends.tolist() == [[2, 2, 3, 5, 5], [5, 5, 5, 5, 5]]
    with pytest.raises(RuntimeError, match="comes back"):
        document_spans(torch.tensor([[0, 1, 0]]))


def test_what_does_not_suit_is_refused_all_at_once():
    q, k, v, _ = make_inputs(numbered(6), 3, 2, 24, torch.float64, num_queries=4)
    spans = document_spans(numbered(4))
    with pytest.raises(ValueError, match=r"float64.*one dtype.*twice.*must be the keys', \[1, 6\]"):
        launch.sqrt_alibi_attention(q, k.float(), v, alibi_slopes(3), *spans)


def test_a_reason_not_to_use_the_kernels_is_told_once(caplog):
    for _ in range(2):
        assert not attention._kernels_suit(torch.device("cpu"), torch.bfloat16, 64)
    assert caplog.text.count("they run on CUDA, not on cpu") == 1


GPU_CASES = {
    "packed": (torch.cat([numbered(*random_lengths(10, 4096, seed=seed)) for seed in range(2)]), 24, 2),
    "one document, odd length": (numbered(4097), 12, 1),
    "64 documents": (numbered(*random_lengths(64, 3001, seed=3)), 16, 1),
    "one head a group": (numbered(1, 1500, 547), 4, 4),
}


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False], ids=["first tiles", "tiles by timing"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", GPU_CASES)
def test_real_sizes_on_a_gpu(case, dim, deterministic):
    documents, heads, groups = GPU_CASES[case]
    documents = documents.cuda()
    inputs = make_inputs(documents, heads, groups, dim, torch.bfloat16, device="cuda")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        ours, again = (run("triton", *inputs, documents) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    exact = run("reference", *(x.float() for x in inputs), documents)
    for a, b in zip(ours, exact, strict=True):
        assert (a.float() - b).norm() / b.norm() < 1e-2


@pytest.mark.gpu
def test_the_farthest_keys_on_a_gpu():
    documents = numbered(131072).cuda()
    inputs = make_inputs(documents, 12, 1, 64, torch.float32, num_queries=65, device="cuda")
    assert max(relative_errors(inputs, documents)) < 1e-5


@pytest.mark.gpu
def test_a_gpu_chooses_the_kernels_and_compiles_around_them():
    documents = numbered(700, 500).cuda()
    q, k, v, _ = make_inputs(documents, 24, 2, 64, torch.bfloat16, device="cuda")
    bias = build_attention_bias(documents, alibi_slopes(24), q.dtype, head_dim=64)
    assert bias.backend == "triton"
    plain = sqrt_alibi_attention(q, k, v, bias)
    compiled = torch.compile(sqrt_alibi_attention, fullgraph=True)(q, k, v, bias)
    assert torch.equal(plain, compiled)
