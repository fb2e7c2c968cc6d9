"""What this node measures, for Prometheus: `GET /metrics` at the root.

Everything is read when it is asked for. Of the cluster a node tells what it knows itself, so each
node is scraped, and sums over nodes count nothing twice: what is the same everywhere (members,
models) is a gauge that is not to be summed.
"""

from collections.abc import Iterator

import trio
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import ollamad
from ollamad.api.asgi import Reply
from ollamad.api.calls import Call
from ollamad.api.metrics import RequestStats
from ollamad.api.status import trouble

# Memory, open files and processor time of this process, by their usual names.
_process = ProcessCollector(registry=None)


async def metrics(call: Call) -> Reply:
    """In the format that the scraper asks for: OpenMetrics, or the older text."""
    encode, content_type = choose_encoder(call.request.headers.get("Accept", ""))
    registry = CollectorRegistry()
    registry.register(_Node(call))
    registry.register(_process)
    return Reply(encode(registry), content_type=content_type.encode())


class _Node(Collector):
    def __init__(self, call: Call) -> None:
        self._api = call.api
        self._services = call.services
        self._websockets = len(call.api.hub)

    def collect(self) -> Iterator[Metric]:
        services = self._services
        build = GaugeMetricFamily(
            "ollamad_build_info", "The program's version.", labels=("version", "commit")
        )
        build.add_metric((ollamad.__version__, services.git_commit), 1)
        yield build
        yield _gauge(
            "ollamad_uptime_seconds",
            "Since the daemon's start.",
            services.monotonic() - self._api.started,
        )
        yield _gauge("ollamad_healthy", "Whether this node can serve.", trouble(self._api) is None)
        yield from _requests("ollamad_http", "HTTP requests", self._api.http_stats)
        yield from _requests("ollamad_inference", "Generations", self._api.inference_stats)
        yield CounterMetricFamily(
            "ollamad_inference_tokens",
            "Tokens of prompts and answers that clients of this node used.",
            value=self._api.inference_stats.tokens,
        )
        yield _gauge(
            "ollamad_inference_queued",
            "Requests that wait at this node, to be let in or for a slot of a runner.",
            services.inference.queued(),
        )
        yield _gauge(
            "ollamad_tasks",
            "Tasks of the event loop; they must not grow with the uptime.",
            trio.lowlevel.current_statistics().tasks_living,
        )
        yield _gauge("ollamad_websockets", "Open WebSockets.", self._websockets)
        yield from self._host()
        yield from self._cluster()
        yield from self._loaded()

    def _host(self) -> Iterator[Metric]:
        host, cluster = self._services.host, self._services.cluster
        beat = cluster.presence(cluster.node_id).beat
        for name, help_, value in (
            ("cpu_usage", "Share of the processors in use.", host.cpu_percent() / 100),
            ("memory_usage", "Share of the memory in use.", host.memory_percent() / 100),
            ("network_usage", "Share of the links in use.", host.network_percent() / 100),
            ("network_bytes_per_second", "Traffic, both ways.", beat.usage.bandwidth),
            ("memory_available_bytes", "Memory that is free.", beat.usage.memory_available),
            ("disk_usage", "Share of the models' disk in use.", beat.usage.disk),
            ("disk_free_bytes", "Free space where models are kept.", beat.usage.disk_free),
        ):
            yield _gauge(f"ollamad_host_{name}", help_, value)
        labels = ("gpu", "name")
        busy = GaugeMetricFamily("ollamad_gpu_usage", "Share of a GPU in use.", labels=labels)
        used = GaugeMetricFamily("ollamad_gpu_memory_used_bytes", "Of a GPU.", labels=labels)
        total = GaugeMetricFamily("ollamad_gpu_memory_bytes", "Of a GPU.", labels=labels)
        for number, gpu in enumerate(beat.gpus):
            which = (str(number), gpu.name)
            busy.add_metric(which, gpu.utilisation)
            used.add_metric(which, gpu.memory_used)
            total.add_metric(which, gpu.memory_total)
        yield from (busy, used, total)

    def _cluster(self) -> Iterator[Metric]:
        cluster = self._services.cluster
        state, consensus = cluster.state, cluster.consensus()
        online = sum(cluster.presence(node_id).online for node_id in state.members)
        for name, help_, value in (
            ("nodes", "Members of the cluster.", len(state.members)),
            ("nodes_online", "Members that this node hears.", online),
            ("voters", "Members that vote.", len(cluster.voters())),
            ("models", "Models of the cluster.", len(state.models)),
            ("is_leader", "Whether this node leads.", cluster.is_leader),
            ("has_quorum", "Whether a majority is there.", cluster.has_quorum),
            ("disk_full", "Whether this node cannot write its log.", consensus.disk_full),
            ("state_age_seconds", "How old this node's state may be.", consensus.silence_s),
        ):
            yield _gauge(f"ollamad_cluster_{name}", help_, value)
        for name, help_, value in (
            ("term", "Elections, by number.", cluster.term),
            ("commit_index", "Entries of the log that are committed.", consensus.commit_index),
            ("applied_index", "Entries that this node has applied.", consensus.applied_index),
        ):
            yield _gauge(f"ollamad_raft_{name}", help_, value)
        copies = GaugeMetricFamily(
            "ollamad_model_copies", "Nodes that hold a model, and are online.", labels=("model",)
        )
        wanted = GaugeMetricFamily(
            "ollamad_model_copies_wanted", "Nodes that should hold a model.", labels=("model",)
        )
        for model in state.models.values():
            alive = sum(cluster.presence(node_id).online for node_id in model.confirmed)
            copies.add_metric((model.name,), alive)
            wanted.add_metric((model.name,), len(model.desired))
        yield from (copies, wanted)

    def _loaded(self) -> Iterator[Metric]:
        cluster = self._services.cluster
        families = {
            field: GaugeMetricFamily(f"ollamad_loaded_model_{name}", help_, labels=("model",))
            for field, name, help_ in (
                ("size", "bytes", "Memory of a model that this node has loaded."),
                ("size_vram", "vram_bytes", "Memory of it on GPUs."),
                ("slots", "slots", "Requests that it serves at once."),
                ("busy", "busy", "Requests that it serves now."),
                ("queued", "queued", "Requests that wait for it."),
            )
        }
        for loaded in cluster.presence(cluster.node_id).beat.loaded:
            for field, family in families.items():
                family.add_metric((loaded.name,), getattr(loaded, field))
        yield from families.values()


def _gauge(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_, value=float(value))


def _requests(prefix: str, what: str, stats: RequestStats) -> Iterator[Metric]:
    seen = stats.snapshot()
    ended = CounterMetricFamily(f"{prefix}_requests", f"{what} that ended.", labels=("outcome",))
    ended.add_metric(("completed",), seen.completed)
    ended.add_metric(("failed",), seen.failed)
    yield ended
    yield _gauge(f"{prefix}_requests_active", f"{what} in progress.", seen.active)
    yield HistogramMetricFamily(
        f"{prefix}_latency_seconds",
        f"{what}: time to the first byte of the answer, or to the end of a generation.",
        buckets=stats.latency_buckets(),
        sum_value=stats.latency_sum_s,
    )
