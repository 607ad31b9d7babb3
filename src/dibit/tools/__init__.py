"""What the commands share: errors, files, progress, machine, units. It knows nothing of compression."""
