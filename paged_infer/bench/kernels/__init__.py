"""``paged-infer bench kernels``: the Triton kernels checked, timed, counted, and compiled for chips that are not here.

problems, fused              what kernels are run on: each described once
checks                       against float64
peers, comparisons           timed in turn with other implementations
sweep_cases, sweep           tiles and split rules, timed beside those in use
launches, attention_traffic  counted
variants, compile_table      compiled ahead of time
report, figure               shown
cli, sweep_cli               the command
"""
