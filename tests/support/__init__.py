"""What the test suites share: scratch file systems and running servers."""
