"""Many runs: benchmarks, ablations, statistics, predictions, and the results that ship with the package."""
