"""`/metrics` for Prometheus: every number is what was measured, and its parser reads it."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ollamad.api.metrics import BUCKETS_S
from ollamad.core.presence import Beat, Gpu, Presence, Usage
from tests.fakes.api_client import LOOPBACK, Answer, ApiClient
from tests.fakes.api_services import NODE_1, NODE_2, NOW


def samples(answer: Answer) -> dict[str, float]:
    """`name{labels}` -> value."""
    assert answer.status == 200, answer.data
    found = {}
    for family in text_string_to_metric_families(answer.data.decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def test_what_is_measured_is_told() -> None:
    client = ApiClient()
    gpu = Gpu("H100", 80_000, 60_000, 0.5)
    usage = Usage(cpu=0.5, disk=0.25, disk_free=1000, memory_available=2000, bandwidth=7.0)
    presences = client.world.cluster.presences
    loaded = presences[NODE_1].beat.loaded
    presences[NODE_1] = Presence(True, NOW, Beat(NOW, usage, loaded=loaded, gpus=(gpu,)))
    presences[NODE_2] = Presence(False, NOW, Beat(NOW, Usage()))
    client.world.inference.waiting = 3
    await client.call("POST", "/generate", {"model": "smollm2:135m", "prompt": "hi"})
    assert (await client.call("GET", "/nope")).status == 404
    client.world.clock.now += 9.5
    seen = samples(await client.call("GET", "root:/metrics", role="viewer"))
    expected = {
        "ollamad_uptime_seconds": 9.5,
        "ollamad_healthy": 1,
        "ollamad_http_requests_total{outcome=completed}": 2,
        "ollamad_http_requests_total{outcome=failed}": 0,
        "ollamad_http_requests_active": 1,  # this one
        "ollamad_inference_requests_total{outcome=completed}": 1,
        "ollamad_inference_queued": 3,
        "ollamad_inference_tokens_total": 28,
        "ollamad_inference_latency_seconds_count": 1,
        "ollamad_http_latency_seconds_count": 2,
        "ollamad_http_latency_seconds_bucket{le=+Inf}": 2,
        "ollamad_websockets": 0,
        "ollamad_host_cpu_usage": 0.3525,
        "ollamad_host_memory_usage": 0.628,
        "ollamad_host_network_usage": 0.185,
        "ollamad_host_network_bytes_per_second": 7,
        "ollamad_host_disk_usage": 0.25,
        "ollamad_host_disk_free_bytes": 1000,
        "ollamad_host_memory_available_bytes": 2000,
        "ollamad_gpu_usage{gpu=0,name=H100}": 0.5,
        "ollamad_gpu_memory_used_bytes{gpu=0,name=H100}": 60_000,
        "ollamad_gpu_memory_bytes{gpu=0,name=H100}": 80_000,
        "ollamad_cluster_nodes": 2,
        "ollamad_cluster_nodes_online": 1,
        "ollamad_cluster_voters": 2,
        "ollamad_cluster_models": 1,
        "ollamad_cluster_is_leader": 1,
        "ollamad_cluster_has_quorum": 1,
        "ollamad_cluster_disk_full": 0,
        "ollamad_cluster_state_age_seconds": 0.042,
        "ollamad_raft_term": 3,
        "ollamad_raft_commit_index": 17,
        "ollamad_raft_applied_index": 17,
        "ollamad_model_copies{model=smollm2:135m}": 1,
        "ollamad_model_copies_wanted{model=smollm2:135m}": 2,
        "ollamad_loaded_model_bytes{model=smollm2:135m}": 10,
        "ollamad_loaded_model_busy{model=smollm2:135m}": 1,
    }
    assert {name: seen.get(name) for name in expected} == pytest.approx(expected)
    assert seen["process_resident_memory_bytes"] > 1_000_000
    assert seen["process_open_fds"] > 2


async def test_latencies_are_counted_in_buckets() -> None:
    stats = ApiClient().app.stats
    for latency_s in (0.0, BUCKETS_S[0], 0.02, 1e6):
        stats.begin()
        stats.end(latency_s, failed=False)
    counts = dict(stats.latency_buckets())
    assert (counts["0.001"], counts["0.01"], counts["0.025"], counts["+Inf"]) == (2, 2, 3, 4)
    assert stats.latency_sum_s == pytest.approx(1e6 + 0.021)


async def test_it_needs_a_viewer_unless_it_is_public() -> None:
    private = ApiClient(role=None)
    assert (await private.call("GET", "root:/metrics")).status == 401
    assert (await private.call("GET", "root:/metrics", peer=LOOPBACK)).status == 200
    public = ApiClient(role=None, metrics_public=True)
    answer = await public.call("GET", "root:/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    # A public page of metrics opens nothing else.
    assert (await public.call("GET", "/metrics")).status == 401


async def test_a_scraper_may_ask_for_openmetrics() -> None:
    accept = "application/openmetrics-text; version=1.0.0; q=0.9, text/plain; q=0.1"
    answer = await ApiClient().call("GET", "root:/metrics", headers={"Accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.data.endswith(b"# EOF\n")
