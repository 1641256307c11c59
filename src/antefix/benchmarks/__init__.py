"""Benchmarks: what is fast, shown side by side with the peers on one machine and in one run.

An arm is one way to do the same work: ours, PEFT's, full fine-tuning, the bare base. Every arm lives in a process of
its own (`worker`), which holds its model ready and works only when its turn comes. Turns are interleaved and only
ratios within a round count (`rounds`), since a machine's speed drifts. Before anything is timed, arms that claim to
compute the same are asked to show it.
"""
