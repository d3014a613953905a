"""Lets vLLM's own code read an artifact, without a GPU: config, model, quantization schemes, loader, rotary table.

    python tests/peers/vllm_loads.py ARTIFACT

Compiled CUDA extensions are replaced by stubs and the platform says it is an H100, so schemes and kernels are chosen as
there; nothing is computed with them. Every parameter of the attention and MLP layers, every KV scale and the rotary
table are then compared with the artifact. Exits with an error where something differs or vLLM refuses.
"""

# ruff: noqa: E402  what is stubbed must be stubbed before vLLM is imported
import os
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

import torch


class Stub(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return missing


def missing(*args, **kwargs):
    raise RuntimeError("a CUDA kernel was called")


missing.default = missing.out = missing
extensions = ["_C_stable_libtorch", "_C", "_moe_C", "_moe_C_stable_libtorch", "vllm_flash_attn"]
for name in [*extensions, "vllm_flash_attn.flash_attn_interface"]:
    stub = sys.modules[f"vllm.{name}"] = Stub(f"vllm.{name}")
    stub.__path__ = []
    stub.is_fa_version_supported = lambda version, *_: version == 3
import vllm.platforms
from vllm.platforms.cuda import CudaPlatformBase
from vllm.platforms.interface import DeviceCapability


class Hopper(CudaPlatformBase):
    get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100")
    get_device_total_memory = classmethod(lambda cls, device_id=0: 80 * 10**9)
    is_fully_connected = classmethod(lambda cls, ids: True)


vllm.platforms._current_platform = Hopper()
from vllm import _custom_ops

for name in dir(_custom_ops):
    if "supports" in name:
        setattr(_custom_ops, name, lambda *_: True)
real = torch._ops._OpNamespace.__getattr__


def any_op(self, name):
    try:
        return real(self, name)
    except AttributeError:
        if self.name.startswith(("_C", "_moe_C", "vllm")):
            return missing
        raise


torch._ops._OpNamespace.__getattr__ = any_op
from vllm.config import CacheConfig, DeviceConfig, LoadConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.utils.torch_utils import set_default_torch_dtype

registry._run_in_subprocess = lambda function: function()
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "build" / "tree"))
from lcconvert.runtime.rope import cos_sin
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec

PARTS = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}


def main(folder: str) -> None:
    source = FolderSource(Path(folder))
    spec = ModelSpec.from_config(source.config)
    model_config = EngineArgs(model=folder, enforce_eager=True, dtype="bfloat16").create_model_config()
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    config.model_config, config.cache_config, config.load_config = model_config, CacheConfig(), LoadConfig()
    config.quant_config = VllmConfig._get_quantization_config(model_config, config.load_config)
    print(f"{model_config.architecture}, max_model_len {model_config.max_model_len}, {model_config.quantization}")
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as meeting:
        init_distributed_environment(1, 0, f"file://{meeting}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1, backend="gloo")
        with set_default_torch_dtype(model_config.dtype):
            model = initialize_model(vllm_config=config)
        DefaultModelLoader(config.load_config).load_weights(model, model_config)
    schemes = Counter(type(m.scheme).__name__ for m in model.modules() if getattr(m, "scheme", None) is not None)
    print("schemes:", dict(schemes) or "16 bit")
    compared = scales = 0
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}."
        for fused, leaves in PARTS.items():
            module, part = layer.get_submodule(fused), prefix + fused.partition(".")[0]
            for leaf, loaded in module.named_parameters():
                if leaf != "weight_shape":
                    wanted = torch.cat([source.tensor(f"{part}.{each}.{leaf}") for each in leaves]).to(loaded.dtype)
                    assert torch.equal(loaded.data, wanted), f"{prefix}{fused}.{leaf}"
                    compared += len(leaves)
        attention = layer.self_attn.attn
        for which in ("k_scale", "v_scale"):
            if f"{prefix}self_attn.{which}" in source.names():
                assert torch.equal(getattr(attention, which).data, source.tensor(f"{prefix}self_attn.{which}"))
                scales += 1
    print(f"{compared} linear tensors equal; {scales} KV scales equal; KV cache {attention.kv_cache_dtype}")
    rotary = model.model.layers[0].self_attn.rotary_emb
    rows = slice(spec.rope.original_max_position, None)
    table = rotary.cos_sin_cache if spec.rope.kind != "longrope" else rotary.long_short_cos_sin_cache[rows]
    last = spec.max_position - 1
    at = torch.tensor([1, last // 4, last // 2, last])
    off = (table[at].double() - torch.cat(cos_sin(spec.rope, spec.head_dim, at, torch.float64), -1)).abs().amax(1)
    print(f"{type(rotary).__name__}, {table.dtype}, off from ours by", dict(zip(at.tolist(), off.tolist())))
    assert off.max() < 0.02, "another rotary table"
    print("accepted")


os.environ.setdefault("HF_HUB_OFFLINE", "1")
main(sys.argv[1])
