"""`--check onnxruntime` of a folder that `export --format onnx` wrote: what is in the files, not what would be written.

The rotary table is read from the data file at a few positions and compared with the exact one of config.json.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcconvert.convert.engine_rope import EngineRope, compared_positions
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.rope import cos_sin
from lcconvert.runtime.spec import ModelSpec

MODEL, GENAI = "model.onnx", "genai_config.json"


def read_onnx(folder: Path) -> tuple[ModelSpec, int, int, EngineRope, list[str]]:
    """The model of config.json, genai_config.json's context and max_length, the baked table, what the products hold.

    UserError for files that are missing, unreadable or not of one export.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        spec = ModelSpec.from_config(json.loads((folder / "config.json").read_bytes()))
        genai = json.loads((folder / GENAI).read_bytes())
        context, longest = int(genai["model"]["context_length"]), int(genai["search"]["max_length"])
        model = onnx.load(str(folder / MODEL), load_external_data=False)
    except (OSError, ValueError, KeyError, TypeError, DecodeError) as problem:
        raise UserError(
            f"{folder} is no whole ONNX export ({type(problem).__name__}: {problem}); export the checkpoint again"
        ) from None
    tables = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in ("cos_cache", "sin_cache")}
    if len(tables) != 2:
        raise UserError(f"{folder}/{MODEL} has no cos_cache and sin_cache; export the checkpoint again")
    rows, half = tables["cos_cache"].dims
    at = compared_positions(spec, rows)
    baked = np.stack([_rows(folder, tables[name], at.numpy()) for name in ("cos_cache", "sin_cache")])
    if half != spec.head_dim // 2:
        raise UserError(
            f"{folder}/{MODEL} has a cos_cache of width {half}, expected {spec.head_dim // 2}; export again"
        )
    exact = torch.stack(cos_sin(spec.rope, spec.head_dim, at, torch.float64)).numpy()
    error = np.abs(baked - exact).max((0, 2))
    rope = EngineRope(
        kind=spec.rope.kind,
        theta=spec.rope.theta,
        factor=spec.rope.factor,
        original_context=spec.rope.original_max_position,
        scale=float(np.hypot(baked[0, 0, -1], baked[1, 0, -1])),
        stored="float32",
        error={int(p): float(e) for p, e in zip(at, error)},
    )
    kinds: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            values = {a.name: a.i for a in node.attribute}
            kinds[f"int{values['bits']} by groups of {values['block_size']} (MatMulNBits)"] += 1
        elif node.op_type == "Gemm":
            kinds["in float32"] += 1
    return spec, context, longest, rope, [f"{count} products {kind}" for kind, count in kinds.items()]


def _rows(folder: Path, tensor: Any, at: np.ndarray) -> np.ndarray:
    """Rows of an initializer in the data file, float64; only their pages are read."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    offset, shape = int(where.get("offset", 0)), tuple(tensor.dims)
    path = folder / Path(where.get("location", "")).name
    if not path.is_file() or path.stat().st_size < offset + 4 * math.prod(shape):
        raise UserError(f"{path} is missing or too short for {tensor.name}; fetch it again")
    return np.memmap(path, np.float32, "r", offset, shape)[at].astype(np.float64)
