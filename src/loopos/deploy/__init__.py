"""The deploy room: from trained models to one that ships."""
