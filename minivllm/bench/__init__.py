"""Benchmarks behind `bench.py`: end-to-end throughput, and the decode-attention kernel."""
