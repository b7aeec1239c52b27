"""What a run costs: memory, time and traffic, before it starts."""
