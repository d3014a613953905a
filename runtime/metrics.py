"""What the server counts, in Prometheus' text format.

Every app has its own registry, so that two apps in one process (tests, or two models) do not mix their numbers and
importing this module registers nothing. Nothing here ever holds prompt or answer text.
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Seconds. A prefill takes milliseconds for a greeting and minutes for a million tokens.
_LONG = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)
_STEP = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1, 3)


class Metrics:
    """The counters of one server; all are safe to touch from the engine thread and the event loop."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "lcconvert_requests", "Requests answered, by path and HTTP status (499: the client left)",
            ["path", "status"], registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("lcconvert_prompt_tokens", "Tokens prefilled", registry=registry)
        self.cached_tokens = Counter(
            "lcconvert_cached_prompt_tokens", "Prompt tokens taken from kept contexts", registry=registry
        )
        self.restored_tokens = Counter(
            "lcconvert_restored_tokens", "Prompt tokens taken from saved sessions", registry=registry
        )
        self.prefixes = Counter(
            "lcconvert_prefix_lookups", "Prompts, by whether a kept context began like them (hit or miss)", ["result"],
            registry=registry,
        )  # fmt: skip
        self.kept_tokens = Gauge(
            "lcconvert_kept_tokens", "Tokens of contexts kept for later prompts", registry=registry
        )
        self.evicted = Gauge("lcconvert_evicted_contexts", "Kept contexts that had to make room", registry=registry)
        self.generated_tokens = Counter("lcconvert_generated_tokens", "Tokens generated", registry=registry)
        self.waiting = Gauge("lcconvert_queue_length", "Requests waiting for the engine", registry=registry)
        self.running = Gauge("lcconvert_running_requests", "Requests that hold a sequence", registry=registry)
        self.kv_tokens = Gauge("lcconvert_kv_tokens", "Tokens in the KV cache", registry=registry)
        self.queue_seconds = Histogram(
            "lcconvert_queue_seconds", "From submission to the start of prefill", buckets=_LONG, registry=registry
        )
        self.prefill_seconds = Histogram(
            "lcconvert_prefill_seconds", "Prefill and first token of a request", buckets=_LONG, registry=registry
        )
        self.restore_seconds = Histogram(
            "lcconvert_restore_seconds", "Taking a context from a saved session", buckets=_LONG, registry=registry
        )
        self.decode_seconds = Histogram(
            "lcconvert_decode_seconds", "One decode step, a token for each of its sequences", buckets=_STEP,
            registry=registry,
        )  # fmt: skip
        self.decode_sequences = Histogram(
            "lcconvert_decode_sequences", "Sequences in a decode step", buckets=range(1, 9), registry=registry
        )

    def render(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
