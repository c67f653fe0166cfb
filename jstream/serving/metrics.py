"""`/metrics`: what the server counts, as Prometheus reads it."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from jstream.serving.alerts import Alerts
from jstream.serving.hub import Hub


class Figures(Collector):
    """Reads the figures when they are asked for."""

    def __init__(self, hub: Hub, alerts: Alerts | None):
        self._hub, self._alerts = hub, alerts

    def collect(self) -> Iterator[Metric]:
        hub, engine = self._hub, self._hub.engine
        running = [stream for stream in hub.streams() if stream.end is None]
        yield GaugeMetricFamily("jstream_ready", "1 when the model is loaded.", hub.status.state == "ready")
        yield GaugeMetricFamily("jstream_streams", "Streams that run.", len(running))
        yield GaugeMetricFamily("jstream_places", "Streams that may run.", engine.streams if engine else 0)
        yield CounterMetricFamily("jstream_streams_opened", "Streams that were opened.", hub.opened)
        yield CounterMetricFamily("jstream_frames", "Frames that were seen.", hub.frames)
        yield CounterMetricFamily("jstream_replies", "Frames at which something was said.", hub.replies)
        yield CounterMetricFamily("jstream_frames_dropped", "Frames that came faster than the model sees.", hub.dropped)
        waiting = sum(len(stream.waiting) for stream in running)
        yield GaugeMetricFamily("jstream_frames_waiting", "Frames that are not answered yet.", waiting)
        latency = GaugeMetricFamily(
            "jstream_latency_seconds",
            "From the arrival of a frame to its event, of the newest 2,000 frames.",
            labels=["quantile"],
        )
        for share, seconds in (hub.quantiles() or {}).items():
            latency.add_metric([f"{share:g}"], seconds)
        yield latency
        yield GaugeMetricFamily(
            "jstream_cache_tokens", "Tokens in the caches of streams that run.", sum(stream.used for stream in running)
        )
        capacity = engine.capacity * engine.streams if engine else 0
        yield GaugeMetricFamily("jstream_cache_capacity_tokens", "Tokens that all caches hold.", capacity)
        if self._alerts is not None:
            counts = self._alerts.counts()
            yield GaugeMetricFamily("jstream_alerts_pending", "Alerts that are not received yet.", counts.pending)
            yield CounterMetricFamily("jstream_alerts_delivered", "Alerts that were received.", counts.delivered)
            yield CounterMetricFamily("jstream_alerts_failed", "Attempts at alerts that failed.", counts.failed)
            lost = counts.given_up + counts.refused
            yield CounterMetricFamily("jstream_alerts_lost", "Alerts that were given up or not taken.", lost)


def exposition(hub: Hub, alerts: Alerts | None) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(Figures(hub, alerts))
    return generate_latest(registry)
