"""Speed and reproduction benchmarks; their figures are kept under results/."""
