"""Parity with the published implementations: `python -m tests.golden [FILE or DIR ...]`.

A golden file holds inputs and the arrays that published code produced from them on deterministic weights (`fill.py`).
"""
