"""What a run leaves on disk, and how another resumes from it."""
