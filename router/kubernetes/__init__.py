"""Barista inside Kubernetes. Only this package imports `kubernetes`, and nothing imports it outside a cluster."""
