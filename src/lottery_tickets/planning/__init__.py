"""Bytes of every operation, item by item, before it starts; and what is free."""
