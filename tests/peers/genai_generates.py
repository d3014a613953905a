"""Lets onnxruntime-genai load an ONNX export and answer a prompt greedily, and compares tokens with our own engine.

    python tests/peers/genai_generates.py CHECKPOINT ONNX_FOLDER [PROMPT_TOKENS]

CHECKPOINT is what the folder was exported from. Our engine computes in float32 with an exact cache and dense attention;
64 tokens are compared, or as many as come before an end token. With PROMPT_TOKENS the prompt is that much plain text
(Python's own documentation) instead of a question, to reach positions past an old window. Exits with an error where
prompt ids or tokens differ; fp16 exports may differ after a near tie.
"""

import json
import pydoc_data.topics
import sys

import onnxruntime_genai
import torch

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.sampler import SamplingParams
from lcconvert.runtime.sidecar import AttentionPolicy, KVConfig

COUNT = 64
source, folder = open_checkpoint(sys.argv[1]), sys.argv[2]
messages = [{"role": "user", "content": "Write a short story about a lighthouse keeper."}]
exact = {"kv": KVConfig(scheme="bf16"), "attention": AttentionPolicy(kind="dense")}
engine = Engine.load(source, device="cpu", dtype=torch.float32, **exact)
model = onnxruntime_genai.Model(folder)
tokenizer = onnxruntime_genai.Tokenizer(model)

if len(sys.argv) > 3:
    text = " ".join(body for _, body in sorted(pydoc_data.topics.topics.items()))
    keep = int(sys.argv[3])
else:
    text, keep = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True), None
    assert text == engine.tokenizer.chat(messages), "the chat template gives another prompt"
ids = engine.tokenizer.encode(text)[:keep]
assert [int(number) for number in tokenizer.encode(text)][:keep] == ids, "the tokenizer gives other ids"

params = onnxruntime_genai.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + COUNT)
generator = onnxruntime_genai.Generator(model, params)
generator.append_tokens(ids)
theirs: list[int] = []
while not generator.is_done():
    generator.generate_next_token()
    theirs.append(int(generator.get_next_tokens()[0]))
ours = [piece.token for piece in engine.generate(ids, SamplingParams(max_tokens=COUNT))]
print(f"{len(ids)} prompt tokens; onnxruntime-genai {onnxruntime_genai.__version__}:\n{tokenizer.decode(theirs)}")
if theirs != ours:
    first = next((at for at, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1]), min(len(theirs), len(ours)))
    sys.exit(f"differs from our engine at token {first} of {len(ours)}:\n{engine.tokenizer.decode(ours)}")
print(f"all {len(ours)} tokens equal our engine's")
