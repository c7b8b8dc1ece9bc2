"""What the board shows: its panels, with the expressions that deploy.grafana.build draws."""

from __future__ import annotations

__all__ = ["CLIENTS", "INSTANCES", "OF_MODEL", "WORKERS", "Panel"]

OF_MODEL = 'model=~"$model"'
"""The label of what the board's variable chooses."""
_RATE = "[$__rate_interval]"
Panel = tuple[str, str, str, tuple[tuple[str, str], ...]]
"""Title, unit, what it says, and expressions with their legends."""

CLIENTS: tuple[Panel, ...] = (
    (
        "Requests a second",
        "reqps",
        "By the error's code, or ok. Probes and scrapes are not among them.",
        ((f"sum by (code) (rate(gateway_requests_total{_RATE}))", "{{code}}"),),
    ),
    (
        "Share that fails",
        "percentunit",
        "Statuses from 500 on, and errors within streams.",
        (
            (
                f'sum(rate(gateway_requests_total{{code!~"ok|cancelled",status=~"5..|200"}}{_RATE}))'
                f" / sum(rate(gateway_requests_total{_RATE})) or vector(0)",
                "failed",
            ),
        ),
    ),
    (
        "Seconds of a request",
        "s",
        "To the end of its reply, of routes that draw.",
        tuple(
            (
                f"histogram_quantile({quantile}, sum by (le) (rate("
                f'gateway_request_seconds_bucket{{route=~".*(images|predict|infer|hf).*"}}{_RATE})))',
                f"p{round(100 * quantile)}",
            )
            for quantile in (0.5, 0.95, 0.99)
        ),
    ),
    (
        "Clients that left",
        "reqps",
        "Before the end of their reply.",
        ((f"sum by (route) (rate(gateway_disconnects_total{_RATE}))", "{{route}}"),),
    ),
    (
        "Bodies that are held",
        "bytes",
        "And how many bytes may be; beyond that 503.",
        (("gateway_body_bytes", "held"), ("gateway_max_body_bytes", "allowed")),
    ),
    (
        "Requests that are open",
        "short",
        "Everything that the gateway serves at the moment.",
        (("gateway_requests_open", "{{instance}}"),),
    ),
)

INSTANCES: tuple[Panel, ...] = (
    (
        "Waiting for an instance",
        "short",
        "Pictures that no instance has yet, and how many may wait.",
        (
            (f"sum by (model) (gateway_requests_waiting{{{OF_MODEL}}})", "{{model}}"),
            ("max(gateway_max_waiting)", "allowed"),
        ),
    ),
    (
        "On each instance",
        "short",
        "Requests that it has, and how many it is given.",
        (
            (f"gateway_instance_requests{{{OF_MODEL}}}", "{{upstream}}"),
            (f"max by (model) (gateway_instance_max_requests{{{OF_MODEL}}})", "allowed"),
        ),
    ),
    (
        "Seconds of waiting and drawing",
        "s",
        "95th percentiles: until an instance had the picture, and from then on.",
        (
            (
                "histogram_quantile(0.95, sum by (model, le) (rate("
                f"gateway_wait_seconds_bucket{{{OF_MODEL}}}{_RATE})))",
                "{{model}} waits",
            ),
            (
                "histogram_quantile(0.95, sum by (model, le) (rate("
                f'gateway_draw_seconds_bucket{{{OF_MODEL},outcome="ok"}}{_RATE})))',
                "{{model}} draws",
            ),
        ),
    ),
    (
        "What came of it",
        "reqps",
        "Of requests to instances: ok, error, died, not_taken, cancelled.",
        (
            (
                f"sum by (outcome) (rate(gateway_draw_seconds_count{{{OF_MODEL}}}{_RATE}))",
                "{{outcome}}",
            ),
        ),
    ),
    (
        "Deaths and starts",
        "short",
        "Requests over which an instance died, those sent once more, and workers READY again.",
        (
            (f"increase(gateway_instance_deaths_total{_RATE})", "{{upstream}} died"),
            (
                f"sum by (model) (increase(gateway_resent_total{{{OF_MODEL}}}{_RATE}))",
                "{{model}} resent",
            ),
            (
                f"increase(gateway_instance_starts_total{{{OF_MODEL}}}{_RATE})",
                "{{upstream}} READY",
            ),
        ),
    ),
    (
        "Refused by instances",
        "reqps",
        "Full, or about to stop: another one was asked, or later.",
        ((f"rate(gateway_not_taken_total{_RATE})", "{{upstream}}"),),
    ),
)

WORKERS: tuple[Panel, ...] = (
    (
        "Rows in flight",
        "short",
        "Beside max_rows, which is all that is batched; a guided picture is two rows.",
        (
            (f"diffusers_rows_in_flight{{{OF_MODEL}}}", "{{upstream}}"),
            (f"max by (model) (diffusers_max_rows{{{OF_MODEL}}})", "max_rows"),
        ),
    ),
    (
        "In flight and waiting in the worker",
        "short",
        "Pictures that are being drawn, and those that wait for room among them.",
        (
            (f"diffusers_requests_in_flight{{{OF_MODEL}}}", "{{upstream}} drawn"),
            (f"diffusers_requests_waiting{{{OF_MODEL}}}", "{{upstream}} wait"),
        ),
    ),
    (
        "Rows a forward",
        "short",
        "What in-flight batching gains: one request alone has one or two.",
        (
            (
                f"rate(diffusers_forward_rows_total{{{OF_MODEL}}}{_RATE})"
                f" / rate(diffusers_forwards_total{{{OF_MODEL}}}{_RATE})",
                "{{upstream}}",
            ),
        ),
    ),
    (
        "Steps and pictures a second",
        "short",
        "Denoising steps are counted when their picture ends.",
        (
            (f"rate(diffusers_steps_total{{{OF_MODEL}}}{_RATE})", "{{upstream}} steps"),
            (f"rate(diffusers_images_total{{{OF_MODEL}}}{_RATE})", "{{upstream}} pictures"),
        ),
    ),
    (
        "Seconds a tick",
        "s",
        "One round of forwards: how long a step takes.",
        (
            (
                f"rate(diffusers_tick_seconds_total{{{OF_MODEL}}}{_RATE})"
                f" / rate(diffusers_ticks_total{{{OF_MODEL}}}{_RATE})",
                "{{upstream}}",
            ),
        ),
    ),
    (
        "Mean seconds by stage",
        "s",
        "In the worker: queue, denoise, decode, and total with the encoding.",
        (
            (
                f"sum by (stage) (rate(diffusers_request_seconds_sum{{{OF_MODEL}}}{_RATE}))"
                f" / sum by (stage) (rate(diffusers_request_seconds_count{{{OF_MODEL}}}{_RATE}))",
                "{{stage}}",
            ),
        ),
    ),
    (
        "Pictures by task",
        "short",
        "A second.",
        (
            (
                f"sum by (task) (rate(diffusers_task_images_total{{{OF_MODEL}}}{_RATE}))",
                "{{task}}",
            ),
        ),
    ),
    (
        "Pictures by LoRA",
        "short",
        "A second; a picture with several counts for each.",
        (
            (
                f"sum by (lora) (rate(diffusers_lora_images_total{{{OF_MODEL}}}{_RATE}))",
                "{{lora}}",
            ),
        ),
    ),
    (
        "How requests ended",
        "reqps",
        "In the worker: ok, flagged, disconnected, or an error's code.",
        (
            (
                f"sum by (outcome) (rate(diffusers_requests_total{{{OF_MODEL}}}{_RATE}))",
                "{{outcome}}",
            ),
        ),
    ),
    (
        "Memory of processes",
        "bytes",
        "Resident; of a worker with the weights that it maps, which instances share.",
        (
            (f"diffusers_worker_memory_bytes{{{OF_MODEL}}}", "{{upstream}} worker"),
            ('process_resident_memory_bytes{job="gateway"}', "{{instance}} gateway"),
        ),
    ),
    (
        "Memory of GPUs",
        "bytes",
        "Reserved by the worker, and free and total of the device; 0 on a CPU.",
        (
            (
                f'diffusers_gpu_memory_bytes{{{OF_MODEL},kind=~"reserved|free|total"}}',
                "{{upstream}} {{kind}}",
            ),
        ),
    ),
    (
        "Out of memory",
        "short",
        "Forwards that were tried again in halves, and pictures that did not fit alone.",
        (
            (
                f"increase(diffusers_out_of_memory_retries_total{{{OF_MODEL}}}{_RATE})",
                "{{upstream}} halved",
            ),
            (
                f'increase(diffusers_requests_total{{{OF_MODEL},outcome="out_of_memory"}}{_RATE})',
                "{{upstream}} refused",
            ),
        ),
    ),
)
