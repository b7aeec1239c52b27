"""Responses of a policy that trains, written here or by workers elsewhere."""
