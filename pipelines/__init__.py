"""Deliver every change in a database to every API that must hear of it."""
