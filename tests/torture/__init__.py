"""Torture: clients that check every result, while the server's processes are killed and replaced under them.

`python -m tests.torture --help` says how to run it for minutes; test_torture.py runs it for seconds.
"""
