"""Schemas: the forms of records other than the published one, each turned into the published form."""
