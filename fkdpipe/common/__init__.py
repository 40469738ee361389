"""What every room uses: settings, errors, progress, processes, the disk."""
