"""What a run leaves on disk, and how another goes on from it."""
