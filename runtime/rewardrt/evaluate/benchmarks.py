"""The table of benchmarks, in the order in which a file's layout is tried (see `layouts.recognise`)."""

from __future__ import annotations

from rewardrt.evaluate import answers, judgebench, processbench, rewardbench, rewardbench2, rm_bench
from rewardrt.evaluate.layouts import Layout

BENCHMARKS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        rewardbench.LAYOUT,
        rewardbench2.LAYOUT,
        rm_bench.LAYOUT,
        judgebench.LAYOUT,
        processbench.LAYOUT,
        answers.BEST_OF_N,
        answers.LISTS,
        answers.PAIRS,
    )
}
