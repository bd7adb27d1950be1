"""Real applications at work on a handlefs mount, over every file system, also while its caches are taken away."""
