"""Tests of the measurements in bench/: their logic, and a tiny run of everything with real mounts."""
