"""Adapters: what implements the ports of `pipelines` with Postgres, HTTP and files."""
