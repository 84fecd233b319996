"""The benchmark command line, `python -m benchmarks`: targets, runs, results and tables."""
