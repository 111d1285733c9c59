"""Stubs generated from proto/barista/v1 (`make proto`). Never edited by hand."""
