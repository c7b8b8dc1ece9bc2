"""Writes the board, diffusers.json: ``python -m deploy.grafana.build``.

Everything on it is a metric of ours. TorchServe's Requests2XX counts probes and its
ts_queue_latency counts what is in flight as waiting, so neither is here; our own histogram of the
worker ends at 10 s as all of TorchServe's do, so means of it are shown and no quantiles.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DynamicConfigValue,
    VariableRefresh,
)

from deploy.grafana.panels import CLIENTS, INSTANCES, OF_MODEL, WORKERS, Panel

__all__ = ["BOARD", "board_json", "main"]

BOARD = Path(__file__).parent / "diffusers.json"

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH, _HEIGHT = 8, 8
_STACKED = ("Pictures by task", "Pictures by LoRA")


def board_json() -> str:
    """The board as Grafana imports it; the same every time."""
    board = (
        dashboard.Dashboard("Diffusers on TorchServe")
        .uid("diffusers-torchserve")
        .tags(["diffusers", "torchserve"])
        .description("docs/monitoring.md says what each metric counts.")
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("model")
            .datasource(_SOURCE)
            .query("label_values(gateway_instance_ready, model)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    for title, panels in (("Clients", CLIENTS), ("Instances", INSTANCES), ("Workers", WORKERS)):
        board = board.with_row(dashboard.Row(title))
        if title == "Instances":
            board = board.with_panel(_ready())
        for panel in panels:
            board = board.with_panel(_lines(panel))
    board = board.with_panel(_what_runs())
    return JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n"


def _lines(panel: Panel) -> timeseries.Panel:
    title, unit, meaning, expressions = panel
    built = (
        timeseries.Panel()
        .title(title)
        .description(meaning)
        .unit(unit)
        .min(0)
        .span(_WIDTH)
        .height(_HEIGHT)
        .datasource(_SOURCE)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if title in _STACKED:
        built = built.fill_opacity(30).stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for place, (expression, legend) in enumerate(expressions):
        built = built.with_target(_query(place, expression, legend))
        if legend in ("allowed", "max_rows"):
            built = built.override_by_name(
                legend,
                [
                    DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 8]}),
                    DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "gray"}),
                ],
            )
    return built


def _ready() -> stat.Panel:
    return (
        stat.Panel()
        .title("READY")
        .description("Each instance: 1 while its worker can draw.")
        .span(3 * _WIDTH)
        .height(_HEIGHT // 2)
        .datasource(_SOURCE)
        .with_target(_query(0, f"gateway_instance_ready{{{OF_MODEL}}}", "{{upstream}}"))
    )


def _what_runs() -> table.Panel:
    return (
        table.Panel()
        .title("What runs")
        .description("Versions, and the digest of the archive that each worker serves.")
        .span(3 * _WIDTH)
        .height(_HEIGHT)
        .datasource(_SOURCE)
        .with_target(_query(0, f"diffusers_worker_info{{{OF_MODEL}}}", "").instant())
    )


def _query(place: int, expression: str, legend: str) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .ref_id(chr(ord("A") + place))
        .expr(expression)
        .legend_format(legend)
        .datasource(_SOURCE)
    )


def main() -> int:
    """Write the board beside this file."""
    BOARD.write_text(board_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
