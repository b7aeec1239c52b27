"""What a run costs on many devices."""
