"""Shared by all packages: settings, errors, progress, distributed processes, disk access."""
