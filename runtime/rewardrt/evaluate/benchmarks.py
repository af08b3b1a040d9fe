"""The table of benchmarks, one row each: a file is of the first whose fields half of its first rows have."""

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
