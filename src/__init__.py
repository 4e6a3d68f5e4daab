"""What every other folder leans on, without mathematics."""
