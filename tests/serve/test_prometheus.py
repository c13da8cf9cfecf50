"""`GET /metrics`: what several nodes count becomes one text, of this application alone."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from fewstep_serve.prometheus import merged


def node(replica: str, requests: int, application: str = "fewstep") -> str:
    """What the metrics port of a node has."""
    labels = f'application="{application}",replica="{replica}"'
    return f"""
# HELP ray_fewstep_requests_total Image requests answered.
# TYPE ray_fewstep_requests_total counter
ray_fewstep_requests_total{{{labels},status="200"}} {requests}
# HELP ray_fewstep_request_ms Time from request to response.
# TYPE ray_fewstep_request_ms histogram
ray_fewstep_request_ms_bucket{{{labels},le="10.0"}} 1
ray_fewstep_request_ms_bucket{{{labels},le="+Inf"}} {requests}
ray_fewstep_request_ms_sum{{{labels}}} 50
ray_fewstep_request_ms_count{{{labels}}} {requests}
# HELP ray_fewstep_train_step Steps done.
# TYPE ray_fewstep_train_step gauge
ray_fewstep_train_step{{run="a"}} 7
# HELP ray_node_mem_used Memory.
# TYPE ray_node_mem_used gauge
ray_node_mem_used 5
"""


def test_counts_of_all_nodes_are_there_once_and_those_of_others_are_not() -> None:
    text = merged([node("a", 3), node("b", 4), node("c", 5, "another")], "fewstep", 1).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {"ray_fewstep_requests", "ray_fewstep_request_ms", "fewstep_silent_nodes"}
    assert {s.labels["replica"]: s.value for s in families["ray_fewstep_requests"].samples} == {
        "a": 3,
        "b": 4,
    }
    assert families["ray_fewstep_request_ms"].type == "histogram"
    assert len(families["ray_fewstep_request_ms"].samples) == 8
    assert families["fewstep_silent_nodes"].samples[0].value == 1
    assert text.count("# TYPE ray_fewstep_requests_total") == 1
