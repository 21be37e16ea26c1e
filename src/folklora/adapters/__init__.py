"""Adapters: one file a method, all carried by the host in `folklora.adapters.host`."""
