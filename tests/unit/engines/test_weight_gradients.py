"""Gradients of matrices are added to their fp32 buffers by the product that makes them, where there is one that can."""

import pytest
import torch
from megatron.core.tensor_parallel import layers

from stepaudio_train.config.schema import EngineConfig, PretrainConfig
from stepaudio_train.engines.megatron.settings import transformer_config
from stepaudio_train.engines.megatron.weight_gradients import fuse_accumulation

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_products_are_added_in_fp32(dtype):
    device = torch.device("cuda") if dtype == torch.bfloat16 else CPU
    if not fuse_accumulation(device, dtype):
        pytest.skip(f"no product of {dtype} that adds to fp32 on {device}")
    torch.manual_seed(0)
    buffer = torch.zeros(24, 40, device=device)
    expected = torch.zeros(24, 40, dtype=torch.float64, device=device)
    for _ in range(3):
        inputs, grads = (torch.randn(64, n, dtype=dtype, device=device) for n in (40, 24))
        layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, grads, buffer)
        expected += grads.double().t() @ inputs.double()
    torch.testing.assert_close(buffer.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_cpu_fuses_in_fp32_alone():
    config = PretrainConfig(engine=EngineConfig(name="megatron"))
    for dtype in (torch.float32, torch.bfloat16):
        assert transformer_config(config, CPU, dtype).gradient_accumulation_fusion == (dtype == torch.float32)
