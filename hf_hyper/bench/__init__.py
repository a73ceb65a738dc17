"""Benchmarks, run with `python -m hf_hyper.bench.NAME`."""
