"""Wording of messages: how they name arguments, numbers, types and lists of names."""
