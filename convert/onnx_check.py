"""Checks an ONNX folder that was just written: its bytes on disk, its form, and its logits against our own decoder.

The logits are compared on two inputs: a short prompt, and a few tokens far behind it (its keys and values, repeated,
are the cache between). The second shows a wrong RoPE table or attention factor, which near tokens hardly do.
The reference is built from the initializers as they lie in the file (they carry the checkpoint's names), so it is the
graph that is under test; that the initializers are the checkpoint's is the digests' part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import nn

from lcconvert.convert.onnx_data import ONNX_TYPES, read_back
from lcconvert.kernels.int4 import dequantize_int4
from lcconvert.runtime.errors import CheckFailed
from lcconvert.runtime.model import Decoder, layer_tables
from lcconvert.runtime.spec import ModelSpec

if TYPE_CHECKING:
    import onnxruntime

TOLERANCE = 1e-3  # float32 logits, absolute; the order of summation differs
_HALF_TOLERANCE = 0.01  # float16 logits, of the largest one; the reference computes in float32
_CACHE_BYTES = 1 << 29  # of float32: positions to 11,650 for a 135M model, past the window of its source
_PROMPT, _LATER = 32, 4  # tokens


def check_files(model_path: Path, digests: Mapping[str, str]) -> None:
    """onnx's own checker, and every external initializer read back from disk; CheckFailed names what is wrong."""
    try:
        onnx.checker.check_model(str(model_path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(f"{model_path.name} is not valid ONNX: {str(error).splitlines()[0]}") from None
    stored = {p.name: p for p in onnx.load(str(model_path), load_external_data=False).graph.initializer}
    for name, digest in digests.items():
        found = hashlib.sha256()
        for piece in read_back(_data_path(model_path, stored[name]), stored[name]):
            found.update(piece)
        if found.hexdigest() != digest:
            raise CheckFailed(f"tensor {name} read back from disk differs from what was written; check the disk")


def compare_logits(model_path: Path, spec: ModelSpec, rows: int) -> float:
    """The largest absolute difference between onnxruntime's logits (CPU) and our decoder's, over both inputs.

    Needs onnxruntime and the float32 weights two or three times in memory. Raises CheckFailed over TOLERANCE, or for a
    float16 model over a hundredth of the largest logit.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model_path), providers=["CPUExecutionProvider"])
    decoder = _decoder_of(model_path, spec)
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(spec.vocab_size, (1, min(_PROMPT, rows)), generator=random)
    nothing = torch.zeros(2, spec.num_layers, spec.num_kv_heads, 0, spec.head_dim)
    ours, cache = _reference(decoder, prompt, nothing)
    theirs = _run(session, prompt, nothing)
    worst, allowed = _difference(ours, theirs), TOLERANCE
    if theirs.dtype == torch.float16:
        allowed = _HALF_TOLERANCE * float(ours.abs().max())
    if (room := rows - _LATER) > 0:
        far = min(room, _CACHE_BYTES // (4 * spec.kv_values_per_token))
        cache = cache.repeat(1, 1, 1, -(-far // cache.shape[3]), 1)[:, :, :, :far].contiguous()
        later = torch.randint(spec.vocab_size, (1, _LATER), generator=random)
        worst = max(worst, _difference(_reference(decoder, later, cache)[0], _run(session, later, cache)))
    if not worst <= allowed:
        raise CheckFailed(
            f"onnxruntime's logits differ from ours by {worst:.2g}, expected at most {allowed:.2g}; the export is wrong"
        )
    return worst


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs.float()).abs().max())


def _reference(decoder: Decoder, ids: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [1, S] after cache [2, layers, Hkv, P, D] -> logits [S, V] at positions P..P+S-1, and the longer cache."""
    new, past, spec = ids.shape[1], cache.shape[3], decoder.spec
    at, key = torch.arange(past, past + new), torch.arange(past + new)
    tables = layer_tables(spec, at)
    grown = []
    with torch.inference_mode():
        x = decoder.embed(ids[0])  # [S, H]
        for index, layer in enumerate(decoder.layers):
            q, k, v = (t.transpose(0, 1) for t in layer.qkv(x, *tables[index]))  # [heads, S, D]
            seen = (key <= at[:, None]) & (key > at[:, None] - (layer.window or past + new))  # [S, P+S]
            k, v = (torch.cat((c[index], t), dim=1) for c, t in zip(cache, (k, v)))
            grown.append(torch.stack((k, v)))
            attn = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, enable_gqa=True)[0]
            x = layer.finish(x, attn.transpose(0, 1).flatten(1))
        return decoder.logits(decoder.model.norm(x)), torch.stack(grown, dim=1)


def _run(session: onnxruntime.InferenceSession, ids: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] in the model's own type, which the cache is cast to."""
    half = any(entry.type == "tensor(float16)" for entry in session.get_inputs())
    cache = cache.half() if half else cache
    feeds = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((1, cache.shape[3] + ids.shape[1]), dtype=np.int64),
    }
    for layer in range(cache.shape[1]):
        for index, kv in enumerate(("key", "value")):
            feeds[f"past_key_values.{layer}.{kv}"] = cache[index, layer][None].numpy()
    return torch.from_numpy(session.run(["logits"], feeds)[0][0])


def _decoder_of(model_path: Path, spec: ModelSpec) -> Decoder:
    """Our decoder with the float32 weights of the ONNX file, whose norms hold their whole factor; int4 is expanded."""
    stored = {p.name: p for p in onnx.load(str(model_path), load_external_data=False).graph.initializer}
    with torch.device("meta"):
        decoder = Decoder(replace(spec, norm_shift=0.0, query_gain=1.0))
    for name in dict(decoder.named_parameters()):
        module, _, leaf = name.rpartition(".")
        if name in stored:
            value = _tensor(model_path, stored[name])
        else:
            codes = _tensor(model_path, stored[f"{name}_packed"]).flatten(1).view(torch.int32)  # [N, K/8]
            value = dequantize_int4(codes, _tensor(model_path, stored[f"{name}_scale"]), torch.float32)
        setattr(decoder.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    return decoder.eval()


def _tensor(model_path: Path, proto: onnx.TensorProto) -> torch.Tensor:
    raw = bytearray(b"".join(read_back(_data_path(model_path, proto), proto)))
    dtype = next(dtype for dtype, kind in ONNX_TYPES.items() if kind == proto.data_type)
    assert len(raw) == dtype.itemsize * math.prod(proto.dims), proto.name
    value = torch.frombuffer(raw, dtype=dtype).view(*proto.dims)
    return value if dtype == torch.uint8 else value.float()


def _data_path(model_path: Path, proto: onnx.TensorProto) -> Path:
    return model_path.parent / next(entry.value for entry in proto.external_data if entry.key == "location")
