"""Perplexity of a GGUF export in llama.cpp and in our decoder, on the same tokens, and a chat answer of llama.cpp.

    python tests/peers/llama_cpp_perplexity.py CHECKPOINT FILE.gguf [TOKENS]

The text is the bundled book; the last 2,047 targets are shown too, which lie past the old window when TOKENS does.
"""

import gzip
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "build" / "tree"))
from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.haystack import BUNDLED
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.tokenizer import Tokenizer

BLOCK = 512


def ours(src: str, count: int) -> tuple[list[int], np.ndarray]:
    """Token ids and the negative log-likelihood of each but the first."""
    source = open_checkpoint(src)
    text = gzip.decompress(BUNDLED.read_bytes()).decode()[50_000 : 50_000 + 8 * count]
    ids = Tokenizer.from_files(source.files).encode(text)[:count]
    with torch.no_grad():
        decoder = load_decoder(source)
        hidden = decoder(torch.tensor([ids]))[0, :-1]
        targets = torch.tensor(ids[1:])
        losses = [
            cross_entropy(decoder.logits(rows), wanted, reduction="none")
            for rows, wanted in zip(hidden.split(BLOCK), targets.split(BLOCK))
        ]
    return ids, torch.cat(losses).double().numpy()


def theirs(path: str, ids: list[int]) -> np.ndarray:
    model = llama_cpp.Llama(path, n_ctx=len(ids), n_batch=BLOCK, logits_all=True, verbose=False)
    losses = []
    for at in range(0, len(ids), BLOCK):
        part, targets = ids[at : at + BLOCK], ids[at + 1 : at + 1 + BLOCK]
        model.eval(part)
        logits = torch.from_numpy(np.array(model.scores[at : at + len(targets)])).double()
        losses.append(cross_entropy(logits, torch.tensor(targets), reduction="none").numpy())
    return np.concatenate(losses)


# the AMX kernels of llama-cpp-python 0.3.36 crash on some virtual machines, with any quantized file
defaults = llama_cpp.llama_model_default_params


def without_amx():
    params = defaults()
    params.use_extra_bufts = False
    return params


llama_cpp.llama_cpp.llama_model_default_params = llama_cpp.llama_model_default_params = without_amx
checkpoint, file = sys.argv[1:3]
ids, here = ours(checkpoint, int(sys.argv[3]) if len(sys.argv) > 3 else 2048)
there = theirs(file, ids)
for name, part in (("all", slice(None)), ("last 2,047", slice(-2047, None))):
    a, b = np.exp(here[part].mean()), np.exp(there[part].mean())
    print(f"{name}: ours {a:.4f}, llama.cpp {b:.4f}, {100 * (b / a - 1):+.3f}%")
chat = llama_cpp.Llama(file, n_ctx=512, verbose=False)
question = [{"role": "user", "content": "What is the capital of France?"}]
print(chat.create_chat_completion(question, max_tokens=40, temperature=0)["choices"][0]["message"]["content"])
