"""Scripts that are run by path, and `common`, which they share with each other and with the benchmarks."""
