"""Adapters to other libraries' networks and files; import them by module."""
