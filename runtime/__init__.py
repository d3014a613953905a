"""The inference side: model, KV cache, engine, server. Knows no recipe; imports kernels only."""
